"""Several sources of text, each with a weight: parsing, and interleaving in proportion to the weights.

pile:0.7,code/:0.3
mix.yaml                                    # a list; the options are those of `text.`
    - {data: pile, weight: 0.7, column: body}
    - {data: chats.jsonl, weight: 0.3, roles: [assistant]}
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from tsae.config import TextConfig
from tsae.data.documents import Document
from tsae.errors import UserError
from tsae.utils.config_json import from_dict
from tsae.utils.notices import warn_once
from tsae.utils.paths import expanded
from tsae.utils.ranges import check_ranges
from tsae.utils.strict_yaml import load_yaml

log = logging.getLogger(__name__)

_OWN = ("column", "split", "subset", "roles", "min_characters", "max_characters")  # options that a source may have
_FILES = (".yaml", ".yml")
_PASSES = 4096  # of a source within an epoch; more would repeat the order of a later epoch


@dataclass(frozen=True)
class Weighted:
    """One source of a mixture.

    data: a source, as for `tsae.data.text.open_text`
    weight: its share of the characters is this, divided by the sum of all weights
    options: fields of `TextConfig` that differ for this source, as pairs
    """

    data: str
    weight: float
    options: tuple[tuple[str, Any], ...] = ()

    def config(self, config: TextConfig, *, hub: bool) -> TextConfig:
        """How to read this source. `text.subset` is left to those sources of the mixture that are on the hub."""
        return replace(config if hub else replace(config, subset=None), **dict(self.options))


def parse_mixture(source: str) -> tuple[Weighted, ...] | None:
    """The sources of a mixture; None for a single source. A path that exists is a single source, unless it is YAML.

    Raises UserError if a weight is missing or not positive, an option is unknown, or a source is named twice.
    """
    if source.startswith("[") and not exists(source):
        found = _parse_list(source, "the list of sources", Path())
    elif source.lower().endswith(_FILES):
        found = _parse_file(source)
    elif exists(source) or not any(_weight_of(part) for part in source.split(",")):
        return None
    else:
        found = tuple(_parse_part(part, source) for part in source.split(","))
    for i, each in enumerate(found):
        if (each.data, each.options) in [(other.data, other.options) for other in found[:i]]:
            raise UserError(
                f"{each.data!r} is named twice among the sources of text: name it once, with all its weight"
            )
        if not exists(each.data) and (each.data.lower().endswith(_FILES) or each.data.startswith("[")):
            raise UserError(f"{each.data!r} cannot be a source of text among others: name the sources in it")
    return found


def spell_mixture(mixture: Sequence[Weighted], absolute: Callable[[str], str]) -> str:
    """The mixture in one line that `parse_mixture` reads in every working directory, with the options of a YAML file.

    absolute: the name of a source that is valid there
    """
    sources = [replace(each, data=absolute(each.data)) for each in mixture]
    if not any(each.options or "," in each.data for each in sources):
        return ",".join(f"{each.data}:{each.weight!r}" for each in sources)
    return json.dumps([{"data": each.data, "weight": each.weight, **dict(each.options)} for each in sources])


def exists(source: str) -> bool:
    """Whether there is a file or folder of this name."""
    try:
        return bool(source) and expanded(source).exists()
    except OSError:  # a name that is too long for one, or a folder that may not be entered, which is found later
        return False


def _weight_of(part: str) -> str | None:
    """What follows the last colon, if it is a number."""
    name, colon, weight = part.rpartition(":")
    try:
        float(weight)
    except ValueError:
        return None
    return weight if colon and name.strip() else None


def _parse_part(part: str, source: str) -> Weighted:
    weight = _weight_of(part)
    if weight is None or exists(part.strip()):
        raise UserError(
            f"the source {part.strip()!r} in {source!r} has no weight: write NAME:WEIGHT for each, or a .yaml file for "
            "names with a comma"
        )
    name = part.rpartition(":")[0].strip()
    return Weighted(name, _positive(float(weight), name))


def _parse_file(source: str) -> tuple[Weighted, ...]:
    path = expanded(source)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no such file or folder: {source!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {source!r}: {error}") from error
    return _parse_list(text, repr(source), path.parent)


def _parse_list(text: str, place: str, folder: Path) -> tuple[Weighted, ...]:
    """folder: which paths may be relative to."""
    try:
        values = load_yaml(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"cannot read {place} as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, list) or not values:
        raise UserError(f"{place} is not a list of sources of text, each with data and weight")
    return tuple(_parse_entry(entry, f"source {i} of {place}", folder) for i, entry in enumerate(values, 1))


def _parse_entry(entry: Any, place: str, folder: Path) -> Weighted:
    if not isinstance(entry, dict) or not {"data", "weight"} <= set(entry):
        raise UserError(f"{place} is no mapping with data and weight")
    unknown = [key for key in entry if key not in ("data", "weight", *_OWN)]
    if unknown:
        raise UserError(f"{place} has the unknown option {unknown[0]!r}: it may have data, weight, {', '.join(_OWN)}")
    data, weight = entry["data"], entry["weight"]
    if not isinstance(data, str) or not data.strip():
        raise UserError(f"{place} has no data: name a file, a folder or a data set")
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise UserError(f"the weight of {place} is {weight!r}; it must be a positive number")
    own = {key: value for key, value in entry.items() if key in _OWN}
    config = from_dict(TextConfig, own, f"text of {place}")
    check_ranges(config, f"text of {place}: ")
    inside = folder / expanded(data)
    return Weighted(
        str(inside) if exists(str(inside)) else data,
        _positive(float(weight), place),
        tuple((key, getattr(config, key)) for key in _OWN if key in own),
    )


def _positive(weight: float, place: str) -> float:
    if not (math.isfinite(weight) and weight > 0):
        raise UserError(f"the weight of {place} is {weight}; it must be a positive number")
    return weight


def interleave(
    openers: Sequence[Callable[[int], Iterator[Document]]], mixture: Sequence[Weighted], epoch: int, *, repeat: bool
) -> Iterator[Document]:
    """Documents of all sources; the next one is of the source that is furthest below its share of the characters.

    openers: for each source, its documents in one of its own epochs
    repeat: until every source has been read once, those that end are read again, in another order. Otherwise none is
        read twice, and those that have not ended go on with shares of what remains.

    Raises UserError, with `repeat`, if a source has no documents; a warning names it otherwise.
    """
    first = [opener(_PASSES * epoch) for opener in openers]  # its errors come before the first document
    return _interleaved(openers, first, mixture, _PASSES * epoch, repeat)


def _interleaved(
    openers: Sequence[Callable[[int], Iterator[Document]]],
    streams: list[Iterator[Document]],
    mixture: Sequence[Weighted],
    epoch: int,
    repeat: bool,
) -> Iterator[Document]:
    characters, passes = [0] * len(streams), [0] * len(streams)
    remaining, unread = list(range(len(streams))), set(range(len(streams)))
    while unread and remaining:
        i = min(remaining, key=lambda i: (characters[i] / mixture[i].weight, i))
        document = next(streams[i], None)
        if document is not None:
            characters[i] += len(document.text)
            yield document
            continue
        unread.discard(i)
        if characters[i] == 0:
            side = "training" if repeat else "evaluation"
            message = f"there is no {side} text in {mixture[i].data!r}, one of the sources"
            if repeat:
                raise UserError(f"{message}: leave it out, or use a larger text")
            warn_once(log, message)
        if not repeat:
            remaining.remove(i)
        elif unread:
            warn_once(log, f"{mixture[i].data!r} has ended before the other sources: reading it again for its share")
            passes[i] += 1
            streams[i] = openers[i](epoch + passes[i])
