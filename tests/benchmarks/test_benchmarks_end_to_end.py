"""The reporting of the benchmarks that run complete jobs; the jobs themselves are not run here."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks import large_dictionary
from benchmarks.end_to_end import LOADING, MODEL, REST, TEXT, TRAINING, Parts, ours, table, write_documents


class Job:
    def outer(self) -> int:
        time.sleep(0.02)
        return self.inner() + 1

    def inner(self) -> int:
        time.sleep(0.05)
        return 1

    def fail(self) -> None:
        time.sleep(0.01)
        raise ValueError


def test_a_part_within_a_part_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("outer", "inner", "fail"):
        monkeypatch.setattr(Job, name, getattr(Job, name))  # so that the wrapping is undone at teardown
    parts = Parts()
    parts.wrap(Job, "outer", TRAINING)
    parts.wrap(Job, "inner", MODEL)
    parts.wrap(Job, "fail", TEXT)
    start = time.perf_counter()
    assert Job().outer() == 2
    with pytest.raises(ValueError):
        Job().fail()
    total = time.perf_counter() - start
    assert parts.seconds[MODEL] >= 0.05
    assert 0.02 <= parts.seconds[TRAINING] < parts.seconds[MODEL]
    assert 0.95 * total < sum(parts.seconds.values()) <= total


def test_the_table_has_shares_rates_and_the_ratio() -> None:
    fast = {TEXT: 1.0, MODEL: 5.0, "activations to and from disk": 0.0, TRAINING: 3.0, REST: 1.0, "in all": 10.0}
    slow = fast | {TRAINING: 13.0, "in all": 20.0}
    found = table({"tsae": fast | {LOADING: 4.0}, "SAELens": slow | {LOADING: 9.0}}, 1000)
    assert "| language model | 5.0 | 50% | 5.0 | 25% |" in found
    assert "| tokens/s | 100 |  | 50 |  |" in found
    assert "2.00 times as fast" in found


@pytest.mark.parametrize("reuse", [1, 12])
def test_the_tables_in_the_docs_are_those_of_the_kept_results(reuse: int) -> None:
    docs = Path(__file__).parents[2] / "docs"
    kept = json.loads((docs / "results" / f"end-to-end-reuse-{reuse}.json").read_text())
    rows = table(kept["results"], kept["tokens"]).partition("\n\n")[0]
    assert rows in (docs / "scale.md").read_text(encoding="utf-8")


def test_documents_are_enough_and_both_sides_read_them(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    write_documents(path, 1000)
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert sum(map(len, texts)) > 8 * 1000
    assert callable(ours)


def test_a_measurement_of_memory_beside_what_is_expected() -> None:
    common = {"d_sae": 65536, "batch": 16}
    rows = [
        common | {"trainer": "topk", "chunk": 4, "peak": 2.0 * 2**30, "seconds": 1.25, "expected": 1.5 * 2**30},
        common | {"trainer": "SAELens TopK", "chunk": 0, "error": "exit code -9"},
    ]
    lines = large_dictionary.table(rows).splitlines()
    assert lines[2] == "| 65,536 | topk | 16 | 4 | 2.00 | 1.50 | 1.2 |"
    assert lines[3] == "| 65,536 | SAELens TopK | 16 | all | exit code -9 |  |  |"
    assert large_dictionary.status("VmHWM") >= large_dictionary.status("VmRSS") > 0
