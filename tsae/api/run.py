"""`Run`: an autoencoder, the language model it encodes, and what its run directory records; and `tsae.open`."""

from __future__ import annotations

import io
import operator
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import torch

from tsae.api.evaluation import Evaluation, evaluate
from tsae.api.features import FeatureView
from tsae.api.options import override
from tsae.api.tables import as_html
from tsae.config import TrainConfig
from tsae.data.harvest import content_activations
from tsae.data.sequences import TokenBatch
from tsae.errors import UserError
from tsae.evaluation.subject import Subject, open_autoencoders, open_run
from tsae.lm.generation import prompt_tokens
from tsae.lm.loading import LanguageModel
from tsae.lm.steering import Positions, ablation, steering
from tsae.reports.figure import save_png
from tsae.reports.records import History, read_history, read_records
from tsae.reports.table import listing
from tsae.rundir import layout
from tsae.sae.model import SparseAutoencoder
from tsae.utils.calling import from_python
from tsae.utils.config_json import load_json
from tsae.utils.paths import expanded
from tsae.view.data import content_tokens, token_texts


@dataclass(frozen=True)
class Report:
    """A run's report.png as it would be drawn now; a notebook shows it.

    png: the file's bytes
    """

    png: bytes

    def save(self, path: str | Path) -> None:
        """Write it to a file."""
        expanded(path).write_bytes(self.png)

    def __repr__(self) -> str:
        return f"Report of {len(self.png):,} bytes (PNG); save(path) writes it"

    def _repr_png_(self) -> bytes:
        return self.png


class Run:
    """An autoencoder and the language model whose activations it encodes; made by `tsae.train` and `tsae.open`.

    source: the directory, or the name on the hub
    directory: the run's directory; None for an autoencoder from elsewhere
    """

    def __init__(self, source: str | Path, directory: Path | None, device: str | None = None) -> None:
        self.source, self.directory, self._device = str(source), directory, device
        self._lm_options: dict[str, Any] = {}
        self._identity = None if directory is None else _identity(directory)

    @classmethod
    def of_directory(cls, directory: Path) -> Run:
        """Of a run's directory, absolute from here on; its files are read when they are needed."""
        return cls(directory.absolute(), directory.absolute())

    @cached_property
    def _subject(self) -> Subject:
        assert self.directory is not None
        self._check_same()
        return open_run(self.directory)

    def _check_same(self) -> None:
        """Raise `UserError` if the directory has got another autoencoder since."""
        if self.directory is not None and _identity(self.directory) != self._identity:
            raise UserError(f"The run in {self.directory} has been replaced or removed since; open it again.")

    @property
    def config(self) -> TrainConfig:
        """The configuration: model, layer, text and, of a run, everything else."""
        return self._subject.config

    @property
    def sae(self) -> SparseAutoencoder:
        """The autoencoder, on raw activations, in ``eval()`` mode."""
        return self._subject.sae

    @cached_property
    def lm(self) -> LanguageModel:
        """The language model, loaded at its first use; the autoencoder then moves to its device."""
        with from_python():
            return self._subject.load_lm(self._device)

    @property
    def metrics(self) -> dict[str, Any]:
        """The run's eval.json (docs/metrics.md); empty before an evaluation, and for an autoencoder from elsewhere."""
        self._check_same()
        path = None if self.directory is None else self.directory / layout.EVALUATION
        return load_json(path) if path is not None and path.is_file() else {}

    @property
    def history(self) -> History:
        """Steps and values of each measurement during training, from metrics.jsonl."""
        self._check_same()
        return {} if self.directory is None else read_history(self.directory / layout.METRICS)

    def report(self) -> Report:
        """The figure of the run: training curves, feature density, autocorrelation over lags.

        Raises:
            UserError: the autoencoder is from elsewhere, and has no run.
        """
        self._check_same()
        if self.directory is None:
            raise UserError(f"{self.source} is no run, so there is nothing to draw; evaluate() has its metrics.")
        png = io.BytesIO()
        save_png(read_records(self.directory), png)
        return Report(png.getvalue())

    @torch.no_grad()
    def features(self, text: str) -> FeatureView:
        """The features of a text, read in one piece from its beginning.

        text: at most as many tokens as the language model takes; beyond `config.length`, the length that the
            autoencoder was trained on, the language model's activations may be unlike any it has seen

        Raises:
            UserError: the text has no token, or more than the model takes.
        """
        with from_python():
            lm = self.lm
            tokens = prompt_tokens(lm, text)  # [1, 1 + T]
            segments = torch.zeros(1, tokens.shape[1] - 1, dtype=torch.int32)
            batch = TokenBatch(tokens, segments)
            x = content_activations(lm, batch, self.config.place)  # [1, T, d_in]
            h = self.sae.encode(x.to(self.sae.W_enc))[0].float().cpu()  # [T, d_sae]
            index, strings = token_texts(lm.tokenizer, content_tokens(batch))
        return FeatureView([strings[i] for i in index], h)

    @contextmanager
    def steer(self, strengths: Mapping[int, float], positions: Positions = None) -> Iterator[Run]:
        """Within the block the model's activations have these features added; see `tsae.lm.steering.steering`.

        strengths: by feature, in the units of the features; ``{f: 2 * float(view.activations[:, f].max())}`` adds twice
            the feature's maximum on a text
        positions: tokens to steer at, counted from 0 after BOS, generated ones included: a slice or indices; None: all
        """
        with steering(self.lm, self.sae, self.config.target_place or self.config.place, strengths, positions):
            yield self

    @contextmanager
    def ablate(self, features: int | Iterable[int], positions: Positions = None) -> Iterator[Run]:
        """Within the block these features' contributions are taken out; see `tsae.lm.steering.ablation`.

        positions: as in `steer`
        """
        chosen = _several(features)
        if self.config.target is not None:
            raise UserError("Features of a transcoder cannot be taken out; steer them by a negative value.")
        with ablation(self.lm, self.sae, self.config.place, chosen, positions):
            yield self

    def evaluate(self, **options: Any) -> Evaluation:
        """`tsae.evaluate` of this autoencoder, on the language model as it was opened."""
        opened = dict(self._lm_options)
        device = opened.pop("lm_device", None) if self._device is None else self._device
        opened |= {} if device is None else {"device": device}
        if self.directory is None:
            opened |= {"model": self.config.model, "layer": self.config.layer, "site": self.config.site}
        return evaluate(self, **(opened | options))

    def __repr__(self) -> str:
        return f"Run({self.source!r}): {self._summary()}"

    def _summary(self) -> str:
        config, sae = self.config, self.sae.cfg
        return f"{config.model}, {config.described}, {sae.d_sae:,} features ({sae.activation})"

    def _repr_html_(self) -> str:
        metrics = self.metrics
        about = f"{self.source}: {self._summary()}"
        return as_html(listing(metrics), about) if metrics else f"<div>{escape(about)}</div>"


def _several(features: Any) -> Iterable[int]:
    """A list of the one feature given, an int, NumPy's integer or a tensor without dimensions, or else the features."""
    try:
        one = operator.index(features)
    except TypeError:
        return features
    return features if isinstance(features, torch.Tensor) and features.ndim else [one]


def _identity(directory: Path) -> tuple[int, int] | None:
    """What changes when another autoencoder is written into a run's directory; None without one."""
    try:
        found = (directory / layout.AUTOENCODER / "cfg.json").stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def open(
    source: str | Path,
    model: str | None = None,
    layer: int | None = None,
    site: str | None = None,
    device: str | None = None,
    **lm_options: Any,
) -> Run:
    """A run, or an autoencoder of another library: features, steering, evaluation.

    source: a run's directory, or an autoencoder in any known format (docs/formats.md), as a directory or as
        `OWNER/NAME/FOLDER` on the hub
    model: the language model that it encodes, as for training; None takes the run's
    layer: the block that it encodes, counted from 0; None takes what the run or its file says
    site: which of the block's activations, as `--site`; None takes what the run or its file says, or else its output
    device: `auto`, `cpu`, `cuda`, ...; None takes the run's
    lm_options: `revision`, `trust_remote_code`, and what training has of options that begin with `lm_`, such as
        ``lm_dtype="float32"``

    Raises:
        UserError: it cannot be read, an option is unknown, or what it encodes is not known.
    """
    with from_python():
        for name in lm_options:
            if not name.startswith("lm_") and name not in ("revision", "trust_remote_code"):
                raise UserError(
                    f"tsae.open has no option {name!r}; give model, layer, site, device, or one of the model's."
                )
        if device is not None and lm_options.get("lm_device_map", "none") != "none":
            raise UserError(
                "lm_device_map divides the language model among all GPUs, without device; leave one of them out."
            )
        path = expanded(source)
        if model is None and layer is None and site is None and _is_run(path):
            run = Run(path.absolute(), path.absolute(), device)
            run._subject.config = override(run.config, lm_options)
            run._lm_options = lm_options
            return run
        name = str(path.absolute()) if path.exists() else str(source)
        found = Run(name, None, device)
        subject = open_autoencoders((name,), model, layer, site)
        subject.config = override(subject.config, lm_options)
        found._lm_options = lm_options
        found.__dict__["_subject"] = subject
        return found


def _is_run(directory: Path) -> bool:
    """Whether a directory is a run's: its config.json is not another library's."""
    path = directory / layout.CONFIG
    return path.is_file() and "preset" in load_json(path)
