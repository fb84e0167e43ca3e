"""Text that autoencoders are measured on: text that no run among them trained on.

Documents on the training side of a run's split are never used. The split (`text.threshold` in config.json) applies to
any text, so a document on its evaluation side was not trained on, even in a copy or an excerpt of the run's text. If
that side of another text has less than one sequence, all of the text is used except the documents of the run's training
text, which is read for the purpose. Autoencoders that are not runs do not say what they were trained on; they are
measured on the evaluation side of the default split.

Limit: documents (passages of about 2,000 characters for plain text) are compared as a unit. The same words cut
differently, such as a book's passages in one file and its chapters in another, are not recognized.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from tsae.config import TrainConfig
from tsae.data.documents import Document
from tsae.data.harvest import ActivationBatch, Harvester
from tsae.data.sequences import SequenceStream, TokenBatch, TooShortError
from tsae.data.text import (
    PYTHON_DOCS,
    TextConfig,
    absolute_source,
    is_local,
    is_same_source,
    open_text,
    open_unseen,
    split_threshold,
)
from tsae.errors import UserError
from tsae.lm.loading import LanguageModel


@dataclass(frozen=True)
class Source:
    """A text, how to read it, and the runs whose training text to avoid, one for each distinct split."""

    data: str
    text: TextConfig
    runs: tuple[TrainConfig, ...]


class HeldOut(NamedTuple):
    """Sequences that no run trained on."""

    batch: TokenBatch
    documents: list[Document]
    """The documents in the order they were packed; the batch may end before the last ones."""
    source: dict[str, Any] | None
    """The text, for eval_source.json; None for the evaluation part of the run's own text."""


def choose_source(runs: Iterable[TrainConfig], data: str | None = None, column: str | None = None) -> Source:
    """The text to measure runs on.

    data, column: as on the command line; None takes the runs'. Without any run, `python-docs`.

    Raises:
        UserError: the runs were trained on different text and ``data`` is None.
    """
    # With BOS or without, the text is the same.
    runs = [replace(run, text=replace(run.text, prepend_bos="auto")) for run in runs]
    distinct = tuple({(run.data, run.text): run for run in runs}.values())
    if len(distinct) == 1:
        (run,) = distinct
        named = run.data if data is None or is_same_source(data, run.data) else absolute_source(data)
        text = run.text if column is None else replace(run.text, column=column)
        return Source(named, text, distinct)
    if distinct and data is None:
        raise UserError("The runs were trained on different text; name the text to compare them on, with --data.")
    return Source(absolute_source(data or PYTHON_DOCS), TextConfig(column=column), distinct)


def held_out(source: Source, lm: LanguageModel, length: int, sequences: int, seed: int) -> HeldOut:
    """At most ``sequences`` sequences of ``length`` tokens of a text that no run trained on.

    seed: of the order of the documents

    Raises:
        UserError: the text cannot be read, or has less than one sequence that was not trained on.
    """
    data, text = source.data, source.text

    def pack(opened: Iterator[Document], part: str | None) -> HeldOut:
        documents: list[Document] = []

        def recorded(epoch: int) -> Iterator[Document]:
            for document in opened:
                documents.append(document)
                yield document

        stream = SequenceStream(recorded, lm.tokenizer, length, repeat=False, prefix=lm.prepend_bos)
        batch = stream.next_batch(sequences)
        named = None if part is None else {"data": data, "column": text.column, "part": part}
        return HeldOut(batch, documents, named)

    if [(run.data, run.text) for run in source.runs] == [(data, text)]:
        return pack(open_text(data, part="evaluation", seed=seed, config=text), None)
    # What lies below the lowest threshold is on the evaluation side of every split.
    thresholds = [split_threshold(run.data, run.text) for run in source.runs]
    other = replace(text, threshold=min(thresholds, default=text.evaluation_share))
    if is_local(data):
        other = replace(other, subset=None)  # the run's, of a hub dataset
    try:
        opened = open_text(data, part="evaluation", seed=seed, config=other)
        return pack(opened, "the evaluation side of the run's split")
    except TooShortError:
        if len(source.runs) > 1:
            raise
    if not source.runs:
        opened = open_text(data, part="evaluation", seed=seed, config=replace(other, threshold=1.0))
        return pack(opened, "all of it")
    (run,) = source.runs
    unseen = open_unseen(data, seed=seed, config=other, trained_on=run.data, trained_config=run.text)
    return pack(unseen, "all but the run's training text")


def evaluation_batches(config: TrainConfig, lm: LanguageModel, sequences: int) -> list[TokenBatch]:
    """At most ``sequences`` sequences of the evaluation part of a run's own text, `buffer.harvest_batch` to a batch.

    Raises:
        UserError: the evaluation part has less than one sequence.
    """
    batch = held_out(choose_source([config]), lm, config.length, sequences, config.stream_seed).batch
    return list(batch.split(config.buffer.harvest_batch))


def training_sample(config: TrainConfig, lm: LanguageModel) -> list[ActivationBatch]:
    """Activations (float32) of a run's training text, as many sequences as its evaluation has.

    Thresholds that are fitted after training are fitted on these.
    """

    def documents(epoch: int) -> Iterator[Document]:
        return open_text(config.data, part="train", seed=config.stream_seed, config=config.text, epoch=epoch)

    stream = SequenceStream(documents, lm.tokenizer, config.length, prefix=lm.prepend_bos)
    harvester = Harvester(lm, config.place, stream, batch=config.buffer.harvest_batch, dtype=torch.float32)
    return list(harvester.batches(harvester.tokenize(config.evaluation.sequences)))
