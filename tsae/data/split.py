"""The split into training and evaluation text, by a hash of each text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from tsae.errors import UserError

Part = Literal["train", "evaluation"]
"""The two sides of the split."""

_SAMPLE = 1_000  # documents that decide whether both sides have text


def hash_fraction(text: str) -> float:
    """A stable hash in [0, 1), uniform over texts and independent of leading and trailing whitespace."""
    digest = hashlib.blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


@dataclass(frozen=True)
class Split:
    """One side of the split: texts whose hash is below the threshold are evaluation text."""

    part: Part
    threshold: float

    def contains(self, text: str) -> bool:
        """Whether the text is on this side; equal texts are always on the same side."""
        return (hash_fraction(text) < self.threshold) == (self.part == "evaluation")


def find_threshold(texts: Iterable[str], share: float, source: str) -> float:
    """The threshold that leaves text on both sides of a source's split.

    It is `share`, unless the source has so few documents that one side would be empty: then it lies just beyond the
    nearest hash. The first 1,000 documents decide.

    texts: in an order that does not depend on seed or part.
    share: fraction of documents held out for evaluation, in [0, 1]; 0 and 1 are returned unchanged.
    Raises UserError if there is no text.
    """
    hashes = sorted({hash_fraction(text) for text in islice(texts, _SAMPLE)})
    if not hashes:
        raise UserError(f"there is no text in {source!r}: every document in it is empty")
    if share in (0, 1):
        return share
    if len(hashes) == 1:
        return 0.0  # a single document is training text
    if hashes[0] >= share:
        return (hashes[0] + hashes[1]) / 2
    if hashes[-1] < share:
        return (hashes[-2] + hashes[-1]) / 2
    return share


def decide_split(texts: Iterable[str], part: Part, share: float, source: str) -> Split:
    """The split of a source at `find_threshold`. Raises UserError if there is no text, or none for this part."""
    threshold = find_threshold(texts, share, source)
    if part == "evaluation" and threshold == 0:
        why = "the evaluation share is 0" if share == 0 else "it holds a single document or passage"
        raise UserError(f"no evaluation text in {source!r} because {why}: name another text for the evaluation")
    if part == "train" and threshold == 1:
        raise UserError(f"no training text in {source!r} because the evaluation share is 1: choose a smaller share")
    return Split(part, threshold)
