"""The text that a run is measured on: the evaluation part of its own, or other text, but none that it trained on.

No document that the run's own split put on the training side is ever used. The run's split (`text.threshold` of its
config.json) holds for other text too, so whatever of that lies on the evaluation side was not trained on, even if
it is a copy or a part of the run's text. Where that is less than one sequence, all of the other text is used but
the documents in the training part of the run's text, which is read for the purpose.

The limit of this: documents (passages of about 2,000 characters, for plain text) are compared as wholes. The same
words cut in another way, as the passages of a book in one file and its chapters in another, are not recognised.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tsae.config import LENGTH, TrainConfig
from tsae.data.documents import Document
from tsae.data.sequences import SequenceStream, TokenBatch, TooShortError
from tsae.data.text import TextConfig, absolute_source, is_same_source, open_text, open_unseen, split_threshold
from tsae.errors import UserError
from tsae.lm.loading import LanguageModel
from tsae.rundir import layout
from tsae.rundir.directory import read_config


class Source(NamedTuple):
    """A text to measure on and how to read it."""

    data: str
    text: TextConfig


class HeldOut(NamedTuple):
    """Sequences that a run did not train on."""

    batch: TokenBatch
    documents: list[Document]
    """The documents in the order they were packed; the last ones may not have been reached."""
    source: dict[str, Any] | None
    """What text it is, for eval_source.json; None for the run's own evaluation part."""


def read_run(run: Path) -> TrainConfig:
    """The configuration of a trained run. Raises UserError unless the directory holds one with an autoencoder."""
    if not run.is_dir():
        raise UserError(f"There is no run directory {run}; name the directory that training wrote.")
    if not (run / layout.CONFIG).is_file():
        raise UserError(
            f"{run} is not a run's directory (it has no config.json); of another autoencoder name the language model, "
            "with --model and --layer."
        )
    config = read_config(run)
    if not layout.has_autoencoder(run):
        raise UserError(f"{run} has no trained autoencoder in sae/; let training finish, or resume it.")
    return config


def source_of(config: TrainConfig, data: str | None, column: str | None) -> Source:
    """The text that `--data` and `--column` name; None takes the run's."""
    name = config.data
    if data is not None and not is_same_source(data, config.data):
        name = absolute_source(data)
    return Source(name, config.text if column is None else replace(config.text, column=column))


def held_out(config: TrainConfig, source: Source, lm: LanguageModel, sequences: int, seed: int) -> HeldOut:
    """At most so many sequences of a text that the run did not train on.

    seed: of the order of the documents
    Raises UserError if the text cannot be read, or nothing of it is left.
    """
    data, text = source
    documents: list[Document] = []

    def recorded(opened: Iterator[Document]) -> Iterator[Document]:
        for document in opened:
            documents.append(document)
            yield document

    def batch(opened: Iterator[Document]) -> TokenBatch:
        documents.clear()
        stream = SequenceStream(lambda epoch: recorded(opened), lm.tokenizer, LENGTH, repeat=False)
        return stream.next_batch(sequences)

    if data == config.data and text == config.text:
        return HeldOut(batch(open_text(data, part="evaluation", seed=seed, config=text)), documents, None)
    other = replace(text, threshold=split_threshold(config.data, config.text))
    if Path(data).expanduser().exists():
        other = replace(other, subset=None)  # the run's, of a hub dataset
    named = {"data": data, "column": text.column}
    try:
        found = batch(open_text(data, part="evaluation", seed=seed, config=other))
        return HeldOut(found, documents, named | {"part": "the evaluation side of the run's split"})
    except TooShortError:
        unseen = open_unseen(data, seed=seed, config=other, trained_on=config.data, trained_config=config.text)
        return HeldOut(batch(unseen), documents, named | {"part": "all but the run's training text"})
