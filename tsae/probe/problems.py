"""Probing problems: labels of tokens, and the tokens that a probe is trained and tested on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch

from tsae.data.documents import Document
from tsae.data.sections import Section
from tsae.data.sequences import TokenBatch, encode_documents, follows_prefix, true_ids
from tsae.lm.tokenizer import prefix_token
from tsae.probe.token_classes import CLASSES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_TOKENS = 20  # per label, in each part
MAX_LABELS = 64  # documents or sections; a larger number is sampled
GAP = 8  # unused tokens between the two parts of a document
NO_LABELS: Mapping[str, Mapping[str, str]] = MappingProxyType({})


@dataclass(frozen=True)
class Problem:
    """One-vs-rest problems over the counted tokens of an evaluation set.

    labels:      L names
    y:           [n] int64, label of each token, -1 for a token in neither part
    train, test: [n] bool, disjoint
    """

    name: str
    labels: tuple[str, ...]
    y: np.ndarray
    train: np.ndarray
    test: np.ndarray


def document_of_tokens(
    batch: TokenBatch, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, *, prefix: bool = True
) -> np.ndarray:
    """[N, T] int64, index in `documents` of each content token, -1 at excluded positions.

    documents: the documents packed into the batch, in order; more may follow
    prefix: whether the sequences begin with BOS, if the tokenizer has one
    """
    tokens = batch.tokens.numpy()
    # Without BOS the first position is text too.
    bos = 1 if prefix and prefix_token(tokenizer) is not None else 0
    content = tokens[:, bos:].reshape(-1)
    first, row = prefix_token(tokenizer) if prefix else None, content.size // len(tokens)
    pieces: list[np.ndarray] = []
    length = 0
    for start in range(0, len(documents), 64):
        for piece in encode_documents(tokenizer, documents[start : start + 64]):
            pieces.append(piece[int(follows_prefix(piece, length, row, first)) :])
            length += len(pieces[-1])
        if length >= content.size:
            break
    flat = true_ids(np.concatenate(pieces))[: content.size]
    if not np.array_equal(flat, content[: flat.size]):
        raise ValueError("documents: the batch was not packed from these")
    owner = np.full(content.size, -1)
    owner[: flat.size] = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])[: content.size]
    owner = owner.reshape(len(tokens), -1)[:, 1 - bos :]
    return np.where(batch.segments.numpy() >= 0, owner, -1)


def pose_problems(
    batch: TokenBatch,
    owner: np.ndarray,
    documents: Sequence[Document],
    sections: dict[str, Section],
    classes: np.ndarray,
    seed: int,
    labels: Mapping[str, Mapping[str, str]] = NO_LABELS,
) -> tuple[list[Problem], dict[str, str]]:
    """The problems that a text supports, and the reasons against the others, by name.

    owner:    [N, T] from `document_of_tokens`
    sections: of the documents, by name, from `tsae.data.sections`; empty if the source has none
    classes:  [n] class of each counted token, from `token_classes`
    seed:     of the choice of training documents for classes and labels, and of labels if there are too many
    labels:   by column, the label of a document by its name, from `tsae.data.labels`

    "document"     which document. Its first part trains and the rest tests, in different sequences, so that neither
                   the language model's context nor a latched feature carries over.
    "section"      which section, for sections of several documents. The first documents train, the others test, at
                   tokens whose sequence has no training token of that section.
    "token class"  which of `CLASSES`. Half of the documents train, the others test.
    "label COLUMN" which value of a column. Half of the documents of each value train, the others test, at tokens whose
                   sequence has no training token of that value.
    """
    counted = batch.segments.numpy() >= 0
    row = np.broadcast_to(np.arange(len(owner))[:, None], owner.shape)[counted]
    owner = owner[counted]  # [n]
    rng = np.random.default_rng(seed)
    posed = {
        "document": _document(owner, row, [document.name for document in documents], rng),
        "section": _section(owner, row, [sections.get(document.name) for document in documents], rng),
        "token class": _token_class(owner, classes, rng),
    }
    for column, label in labels.items():
        posed[f"label {column}"] = _label(column, owner, row, [label.get(each.name) for each in documents], rng)
    problems = [problem for problem in posed.values() if isinstance(problem, Problem)]
    return problems, {name: why for name, why in posed.items() if isinstance(why, str)}


def _document(owner: np.ndarray, row: np.ndarray, names: list[str], rng: np.random.Generator) -> Problem | str:
    parts = {}
    for document, tokens in _tokens_by(owner).items():
        border = _middle(row[tokens])
        train, test = tokens[:border], tokens[border + GAP :]
        if min(len(train), len(test)) >= MIN_TOKENS:
            parts[names[document]] = (train, test)
    why = f"fewer than two documents have {MIN_TOKENS} tokens in one sequence and as many in a later one"
    return _of_parts("document", parts, len(owner), rng) or why


def _section(
    owner: np.ndarray, row: np.ndarray, places: list[Section | None], rng: np.random.Generator
) -> Problem | str:
    if not any(places):
        return (
            "the text has no sections; python-docs has, and so has plain text with titles (lines `= Title =`) or in "
            "several files"
        )
    members: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for document in np.unique(owner).tolist():
        if (place := places[document]) is not None:
            members[place.name].append((place.place, document))
    why = f"fewer than two sections have {MIN_TOKENS} tokens in one document and as many in a later one; give more text"
    ordered = {name: [document for _, document in sorted(inside)] for name, inside in members.items()}
    return _of_parts("section", _halves(ordered, owner, row), len(owner), rng) or why


def _label(
    column: str, owner: np.ndarray, row: np.ndarray, labels: list[str | None], rng: np.random.Generator
) -> Problem | str:
    members: dict[str, list[int]] = defaultdict(list)
    for document in rng.permutation(np.unique(owner)).tolist():
        if (label := labels[document]) is not None:
            members[label].append(document)
    why = f"fewer than two values have {MIN_TOKENS} tokens in some documents and as many in others; give more text"
    return _of_parts(f"label {column}", _halves(members, owner, row), len(owner), rng) or why


def _halves(
    members: Mapping[str, list[int]], owner: np.ndarray, row: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Training tokens, of the first documents of each name, and test tokens, of the others in other sequences."""
    of_document = _tokens_by(owner)
    parts = {}
    for name, inside in members.items():
        order = [of_document[document] for document in inside]
        border = _middle(np.repeat(np.arange(len(order)), [len(tokens) for tokens in order]))
        tokens = np.concatenate(order)
        train, test = tokens[:border], tokens[border:]
        test = test[~np.isin(row[test], row[train])]
        if min(len(train), len(test)) >= MIN_TOKENS:
            parts[name] = (train, test)
    return parts


def _token_class(owner: np.ndarray, classes: np.ndarray, rng: np.random.Generator) -> Problem | str:
    found = np.unique(owner)
    train = np.isin(owner, rng.permutation(found)[: (len(found) + 1) // 2])
    counts = np.stack([np.bincount(classes[part & (classes >= 0)], minlength=len(CLASSES)) for part in (train, ~train)])
    kept = np.flatnonzero((counts >= MIN_TOKENS).all(axis=0))
    if len(kept) < 2:
        return f"fewer than two classes have {MIN_TOKENS} tokens in each half of the documents"
    index = np.full(len(CLASSES) + 1, -1)  # the last entry is for class -1
    index[kept] = np.arange(len(kept))
    y = index[classes]
    return Problem("token class", tuple(CLASSES[i] for i in kept), y, train & (y >= 0), ~train & (y >= 0))


def _of_parts(
    name: str, parts: dict[str, tuple[np.ndarray, np.ndarray]], n: int, rng: np.random.Generator
) -> Problem | None:
    """The problem whose labels have these training and test tokens; None for fewer than two labels."""
    labels = sorted(parts)
    if len(labels) > MAX_LABELS:
        labels = sorted(rng.choice(labels, MAX_LABELS, replace=False).tolist())
    if len(labels) < 2:
        return None
    y, train, test = np.full(n, -1), np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    for label, key in enumerate(labels):
        for tokens, part in zip(parts[key], (train, test), strict=True):
            y[tokens], part[tokens] = label, True
    return Problem(name, tuple(labels), y, train, test)


def _tokens_by(owner: np.ndarray) -> dict[int, np.ndarray]:
    """The tokens of each document, in ascending order."""
    order = np.argsort(owner, kind="stable")
    documents, starts = np.unique(owner[order], return_index=True)
    return dict(zip(documents.tolist(), np.split(order, starts[1:]), strict=True))


def _middle(group: np.ndarray) -> int:
    """The boundary between runs of equal numbers nearest to the middle; the end if there is one run."""
    borders = np.flatnonzero(np.diff(group)) + 1
    return int(borders[np.abs(borders - len(group) / 2).argmin()]) if len(borders) else len(group)


def counted_tokens(batch: TokenBatch) -> torch.Tensor:
    """[n] int64 token ids at counted positions."""
    return batch.tokens[:, 1:][batch.segments >= 0]
