"""Methods at several widths and numbers of tokens: plans the grid, trains what is missing within a time budget.

    python experiments/scale.py RUNS --data CORPUS --cache CACHE --plan
    python experiments/scale.py RUNS --data CORPUS --cache CACHE --results docs/results/scale.jsonl --hours 8

CORPUS is what experiments/corpus.py wrote. CACHE is the activation cache of all cells; this fills it:

    python experiments/scale.py RUNS --data CORPUS --cache CACHE --harvest

A cell is one autoencoder: method, width, tokens, active features (k) and seed. All cells read the same stream, each its
first 1, 4 or 10 million tokens, once. The time of a cell is predicted from a few steps of its method and width, and
from the cells that are done. Cells that the budget does not pay for are dropped, the most expensive first, and named.
Each cell that is done is a line of the results; one that is there is skipped, one that was interrupted is resumed.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

import tsae
from tsae.config import TrainConfig
from tsae.data.harvest import ActivationBatch
from tsae.evaluation.catalogue import lookup
from tsae.lm.loading import default_dtype
from tsae.presets import preset
from tsae.rundir import layout
from tsae.sae.normalization import InputNormalizer
from tsae.training.trainer import Trainer
from tsae.utils.atomic import atomic_write, write_json

ONE_THRESHOLD = {"activation": "schmitt", "gate_gradient": 0.0}
NO_TERM = {"temporal": "none"}
RATE = {"amplitude_bits": 4.0, "release_ratio": 0.25}
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {"sae": ONE_THRESHOLD | {"release_ratio": 1.0}, "objective": NO_TERM},
    "batchtopk": {"sae": {"activation": "batchtopk"}, "objective": NO_TERM},
    "hysteresis-0.4": {"sae": ONE_THRESHOLD | {"release_ratio": 0.4}, "objective": NO_TERM},
    "default-0.2": {
        "sae": ONE_THRESHOLD | {"release_ratio": 0.4},
        "objective": {"temporal": "contrastive+window", "contrastive_weight": 2.0, "window_weight": 0.02},
    },
    "hysteresis-0.4-with-gate": {"sae": {"activation": "schmitt", "release_ratio": 0.4}, "objective": NO_TERM},
    "rate": {"sae": RATE, "objective": NO_TERM},
    "rate-a6": {"sae": RATE | {"amplitude_bits": 6.0}, "objective": NO_TERM},
    "demo": {
        "sae": {"amplitude_bits": 6.0, "release_ratio": 0.1},
        "objective": {"temporal": "contrastive+window", "contrastive_weight": 1.5, "window_weight": 0.015},
    },
}
"""Name -> options beside those of the demo."""

WIDTHS = (2_560, 10_240, 40_960)
TOKENS = (1_000_000, 4_000_000, 10_000_000)
KS: dict[str, tuple[int, ...]] = {
    "plain": (28, 36),
    "batchtopk": (28, 36),
    "hysteresis-0.4": (36,),
    "default-0.2": (38,),
    "hysteresis-0.4-with-gate": (36,),
    "rate": (38,),
    "rate-a6": (38,),
    "demo": (38,),
}
"""Active features of each method: two sizes of a baseline, between which its bits are interpolated, and one size of
the others, whose explained variance is between those with 4 million tokens or more; with fewer, --k gives the sizes."""
SEEDS = 3
SEVERAL_SEEDS = 2_560 * 4_000_000  # width times tokens up to which a cell has three seeds

BATCH, LENGTH = 8, 128
DATA_SEED = 23  # a text order that no tuning used
SHUFFLE = 1_000_000  # more documents than the corpus has: the order is a complete shuffle
STREAM: dict[str, Any] = {
    "batch": BATCH,
    "length": LENGTH,
    "data_seed": DATA_SEED,
    "lm_dtype": "bfloat16",
    "text": {"shuffle_buffer": SHUFFLE},
    "buffer": {"reuse": 1, "sequences": 1024, "dtype": "bfloat16"},
    "evaluation": {"sequences": 384, "ce_sequences": 16},
    "log_every": 50,
}
"""What all cells share, and the cache with them."""

METRICS = (
    *("explained_variance", "ce_loss_score", "frac_alive", "l0"),
    *("temporal.support_bits", "temporal.support_bits_memoryless", "temporal.total_bits"),
    *("temporal.persistence", "temporal.persistence_excess", "temporal.persistence_excess_shuffled"),
)
OVERHEAD = 120.0  # seconds of a cell beside its steps, until a cell is done
TIMED = 3  # steps


@dataclass(frozen=True)
class Cell:
    """One autoencoder of the grid."""

    method: str
    d_sae: int
    tokens: int
    k: int
    seed: int

    @property
    def steps(self) -> int:
        """Optimizer steps; each token is seen once."""
        return self.tokens // (BATCH * LENGTH)

    @property
    def name(self) -> str:
        """Of its directory: `plain-10240-4M-k28-seed0`."""
        return f"{self.method}-{self.d_sae}-{self.tokens / 1e6:g}M-k{self.k}-seed{self.seed}"


@dataclass(frozen=True)
class Planned:
    """A cell and its predicted seconds."""

    cell: Cell
    seconds: float


def grid(
    methods: Sequence[str] = (),
    ks: Sequence[int] = (),
    seeds: int = SEEDS,
    widths: Sequence[int] = (),
    tokens: Sequence[int] = (),
) -> list[Cell]:
    """All cells, in order of size; what is given replaces what is above."""
    sizes = sorted(itertools.product(widths or WIDTHS, tokens or TOKENS), key=math.prod)
    return [
        Cell(method, d, count, k, seed)
        for d, count in sizes
        for seed in range(seeds if d * count <= SEVERAL_SEEDS else 1)
        for method in methods or METHODS
        for k in ks or KS[method]
    ]


def options(cell: Cell, data: str, cache: str) -> dict[str, Any]:
    """Keywords of `tsae.train`."""
    found = {**STREAM, "data": data, "cache": cache, "steps": cell.steps, "seed": cell.seed}
    found["checkpoint"] = {"every": max(500, cell.steps // 4), "keep": 1}
    own = METHODS[cell.method]
    return found | own | {"sae": {**own.get("sae", {}), "d_sae": cell.d_sae, "k": cell.k}}


def seconds_per_token(method: str, d_sae: int, d_in: int = 640) -> float:
    """Of a training step, measured on made-up activations; the median of a few steps."""
    cell = Cell(method, d_sae, BATCH * LENGTH, KS[method][0], 0)
    base: TrainConfig = preset("demo")
    own = options(cell, base.data, "")
    cfg = replace(
        base,
        batch=BATCH,
        length=LENGTH,
        steps=10_000,
        sae=replace(base.sae, **own["sae"], d_in=d_in),
        objective=replace(base.objective, **{**own.get("objective", {}), "hold_steps": 0, "ramp_steps": 1}),
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, LENGTH, d_in, generator=generator)
    batch = ActivationBatch(x, torch.zeros(BATCH, LENGTH, dtype=torch.int32))
    device = torch.device("cpu")
    trainer = Trainer(cfg, InputNormalizer.identity(d_in), device, autocast=default_dtype(device) == torch.bfloat16)
    times = []
    for _ in range(1 + TIMED):
        start = time.perf_counter()
        trainer.train_step(batch)
        times.append(time.perf_counter() - start)
    return median(times[1:]) / (BATCH * LENGTH)


def timings(path: Path, cells: Iterable[Cell]) -> dict[str, float]:
    """Seconds per token by `METHOD WIDTH`, measured where the file has none, and kept there."""
    found: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
    for method, d_sae in dict.fromkeys((cell.method, cell.d_sae) for cell in cells):
        if (key := f"{method} {d_sae}") not in found:
            found[key] = seconds_per_token(method, d_sae)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, found)
    return found


def predict(cells: Iterable[Cell], per_token: dict[str, float], done: dict[Cell, dict[str, Any]]) -> list[Planned]:
    """The cells with their times, by what the cells that are done took for their steps and beyond, in the median."""
    beyond = [row["seconds"] - row["training_seconds"] for row in done.values() if row.get("training_seconds")]
    overhead = median(beyond) if beyond else OVERHEAD
    # Steps take longer or shorter than those that were timed, when others use the machine.
    ratios = [
        row["training_seconds"] / (per_token[f"{cell.method} {cell.d_sae}"] * cell.tokens)
        for cell, row in done.items()
        if row.get("training_seconds") and f"{cell.method} {cell.d_sae}" in per_token
    ]
    factor = median(ratios) if ratios else 1.0
    return [Planned(cell, overhead + factor * per_token[f"{cell.method} {cell.d_sae}"] * cell.tokens) for cell in cells]


def within(planned: list[Planned], seconds: float) -> tuple[list[Planned], list[Planned]]:
    """The cells that fit in a time, cheapest first, and those that were dropped, the most expensive first."""
    kept = sorted(planned, key=lambda each: each.seconds)
    dropped = []
    while kept and sum(each.seconds for each in kept) > seconds:
        dropped.append(kept.pop())
    return kept, dropped


def tokens_in_cache(cache: Path) -> int:
    """Tokens in the complete shards of a cache; 0 if there is none."""
    manifest = cache / "manifest.json"
    if not manifest.is_file():
        return 0
    values = json.loads(manifest.read_text())
    return int(sum(shard["sequences"] for shard in values["shards"]) * values["request"]["length"])


def read_results(path: Path) -> dict[Cell, dict[str, Any]]:
    """The line of each cell that is done."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return {Cell(**row["cell"]): row for row in rows}


def add_result(path: Path, row: dict[str, Any]) -> None:
    """Add a line; the file is replaced as a whole, so that it has complete lines only."""
    before = path.read_text() if path.is_file() else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(before + json.dumps(row) + "\n")


def measure(cell: Cell, runs: Path, data: str, cache: str) -> dict[str, Any]:
    """Train and evaluate a cell, or go on with it; its line of the results. Its checkpoints are removed."""
    out, start = runs / cell.name, time.perf_counter()
    resumed = (out / layout.CONFIG).is_file()
    if not (out / layout.EVALUATION).is_file():
        if resumed:
            tsae.train(resume=out)
        else:
            tsae.train("demo", out=out, overwrite=True, **options(cell, data, cache))
    seconds = time.perf_counter() - start
    metrics = json.loads((out / layout.EVALUATION).read_text())
    shutil.rmtree(out / layout.CHECKPOINTS, ignore_errors=True)
    log = [json.loads(line) for line in (out / layout.METRICS).read_text().splitlines()]
    rate = median(line["tokens_per_second"] for line in log if line.get("tokens_per_second"))
    kept: dict[str, Any] = {}
    for key in METRICS:
        *parents, leaf = key.split(".")
        inner = kept
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[leaf] = float(f"{lookup(metrics, key):.6g}")
    whole = {} if resumed else {"seconds": seconds, "training_seconds": cell.tokens / rate}
    return {"cell": asdict(cell), **whole, "tokens_per_second": rate, "metrics": kept}


def duration(seconds: float) -> str:
    """Hours and minutes."""
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h"


def describe(title: str, planned: list[Planned]) -> Iterator[str]:
    """The cells of a list, one line for each size and method."""
    yield f"{title}: {len(planned)} cells, {duration(sum(each.seconds for each in planned))}"
    groups: dict[tuple[int, int, str], list[Planned]] = {}
    for each in planned:
        groups.setdefault((each.cell.d_sae, each.cell.tokens, each.cell.method), []).append(each)
    for (d_sae, tokens, method), members in groups.items():
        mean = sum(each.seconds for each in members) / len(members)
        what = ", ".join(f"k {each.cell.k} seed {each.cell.seed}" for each in members)
        yield f"  {d_sae:>6,} features  {tokens / 1e6:>4g} M tokens  {method:<15} {duration(mean)} each  ({what})"


def plan(arguments: argparse.Namespace, seconds: float) -> list[Planned]:
    """What remains to be done within a time, cheapest first; says what is done, dropped or waits, and why."""
    cells = grid(arguments.methods, arguments.k, arguments.seeds, arguments.widths, arguments.tokens)
    done = read_results(arguments.results)
    left = [cell for cell in cells if cell not in done]
    have = tokens_in_cache(arguments.cache)
    ready = [cell for cell in left if arguments.plan or cell.steps * BATCH * LENGTH <= have]
    kept, dropped = within(predict(ready, timings(arguments.runs / "timings.json", cells), done), seconds)
    print(f"{len(done)} cells are done; the cache has {have:,} tokens.")
    if waiting := len(left) - len(ready):
        print(f"{waiting} cells wait for the cache, which --harvest fills.")
    print("\n".join(describe("Planned", kept)))
    if dropped:
        print("\n".join(describe("Dropped, the most expensive first", dropped)), flush=True)
    return kept


def run(arguments: argparse.Namespace) -> None:
    """Train and measure cells until the time is over, the cheapest first; plans again after each."""
    end = time.monotonic() + 3600 * arguments.hours
    while planned := plan(arguments, end - time.monotonic()):
        cell = planned[0].cell
        print(f"{cell.name}: {duration(planned[0].seconds)} predicted", flush=True)
        try:
            row = measure(cell, arguments.runs, arguments.data, str(arguments.cache))
        except tsae.UserError as error:  # diverged, for example: said in the results
            row = {"cell": asdict(cell), "error": str(error)}
        add_result(arguments.results, row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder for the runs and the measured times")
    parser.add_argument("--data", required=True, help="the corpus")
    parser.add_argument("--cache", type=Path, required=True, help="the activation cache")
    parser.add_argument("--results", type=Path, default=Path("docs/results/scale.jsonl"), help="file of the results")
    parser.add_argument("--hours", type=float, default=float("inf"), help="time budget; default none")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--k", nargs="+", type=int, default=[], help="active features of all methods")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of the cells that have several")
    parser.add_argument("--widths", nargs="+", type=int, default=[], help="features of the dictionaries")
    parser.add_argument("--tokens", nargs="+", type=int, default=[], help="training tokens")
    parser.add_argument("--plan", action="store_true", help="print the plan, whatever the cache holds, and stop")
    parser.add_argument("--harvest", action="store_true", help="fill the cache, and stop")
    arguments = parser.parse_args()
    if arguments.harvest:
        longest = max(grid(), key=lambda cell: cell.tokens)
        tsae.train("demo", harvest_only=True, **options(longest, arguments.data, str(arguments.cache)))
    elif arguments.plan:
        plan(arguments, 3600 * arguments.hours)
    else:
        run(arguments)


if __name__ == "__main__":
    main()
