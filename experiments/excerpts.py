"""Short excerpts of a corpus's evaluation documents, for probes that need many documents with labels.

    python experiments/excerpts.py CORPUS OUT
    python -m tsae.probe RUNS --data OUT --labels kind language source

CORPUS is what experiments/corpus.py wrote; its documents have thousands of tokens, so a sample has few of each label.
OUT gets one file with the same columns. An excerpt is at most 400 characters of a document on the evaluation side of
the split, and itself on that side, since `tsae.probe` uses no others. The same corpus gives the same bytes.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from tsae.config import TextConfig
from tsae.data.documents import cut
from tsae.data.split import Split
from tsae.data.text import split_threshold
from tsae.utils.atomic import atomic_write

LONGEST = 400  # characters of an excerpt
SHORTEST = 200


def excerpts(corpus: Path) -> Iterator[dict[str, str]]:
    """Rows like those of the corpus, in its order."""
    held_out = Split("evaluation", split_threshold(str(corpus), TextConfig()))
    for path in sorted(corpus.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for row in map(json.loads, file):
                if held_out.contains(row["text"]):
                    for text in cut([row["text"]], LONGEST):
                        if len(text) >= SHORTEST and held_out.contains(text):
                            yield row | {"text": text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder that experiments/corpus.py wrote")
    parser.add_argument("out", type=Path, help="folder for the excerpts")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    count = 0
    with atomic_write(arguments.out / "excerpts.jsonl") as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in excerpts(arguments.corpus):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    print(f"{count:,} excerpts")


if __name__ == "__main__":
    main()
