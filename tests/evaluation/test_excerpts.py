"""Excerpts for probes: of held-out documents alone, with their labels."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from experiments import excerpts
from tsae.data.split import hash_fraction


def test_excerpts_are_held_out_and_of_held_out_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    corpus.mkdir()
    rows = [
        {"text": f"{number} " + "word " * 70 + "\n\n" + f"{number} " * 60, "kind": "book", "language": str(number)}
        for number in range(2_000)
    ]
    with gzip.open(corpus / "a.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(sys, "argv", ["excerpts", str(corpus), str(out)])
    excerpts.main()
    found = [json.loads(line) for line in (out / "excerpts.jsonl").read_text().splitlines()]
    assert len(found) > 3
    held_out = {row["language"] for row in rows if hash_fraction(row["text"]) < 0.05}
    for row in found:
        assert row["language"] in held_out
        assert row["text"].startswith(row["language"])
        assert hash_fraction(row["text"]) < 0.05
        assert excerpts.SHORTEST <= len(row["text"]) <= excerpts.LONGEST
        assert row["kind"] == "book"
