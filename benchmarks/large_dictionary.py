"""Memory and time of training steps with large dictionaries: tsae, also in chunks of the batch, and SAELens's trainer.

    make peers
    python -m benchmarks.large_dictionary [--sizes 16384 65536] [--batch 16] [--chunk 0 2] [--json FILE]

Width 2,304, 16 sequences of 128 tokens per step, 32 active features, bfloat16 autocast, random activations. tsae uses
TopK or BatchTopK and the temporal statistics of TSAE's three bands in its loss; SAELens uses its default TopK without a
temporal term. Every measurement runs in its own process and reports the peak resident memory beyond that before the
autoencoder was created, the median time of the steps after the first, and the memory that `tsae.training.memory`
predicts. `StepTime` is the formula for the time in docs/scale.md; `--fit FILE` fits it to the output of `--json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.measure import status

WIDTH, LENGTH, K = 2304, 128, 32
STEPS = 3
OURS = ("topk", "batchtopk")
PEER = "SAELens TopK"


class StepTime(NamedTuple):
    """Seconds per step: ``tokens d_sae feature + weights (weight + piece (chunks - 1))``.

    feature: per token and feature: the encoder's product (2 d_in operations) and all passes over the features
    weight: per weight: its gradient, clipping, Adam and the norms
    piece: per weight and additional chunk: writing and adding its gradient once more
    """

    feature: float
    weight: float
    piece: float

    @staticmethod
    def terms(row: dict[str, Any]) -> tuple[float, float, float]:
        """The factors of the three coefficients for a measured row."""
        tokens, weights = row["batch"] * LENGTH, 2.0 * WIDTH * row["d_sae"]
        chunks = -(-row["batch"] // row["chunk"]) if row["chunk"] else 1
        return float(tokens * row["d_sae"]), weights, weights * (chunks - 1)

    @classmethod
    def fitted(cls, rows: list[dict[str, Any]]) -> StepTime:
        """Least squares of the relative errors over measured rows."""
        import torch

        terms = torch.tensor([cls.terms(row) for row in rows], dtype=torch.float64)
        seconds = torch.tensor([row["seconds"] for row in rows], dtype=torch.float64)
        scale = terms.amax(0)
        relative = terms / scale / seconds[:, None]
        found = torch.linalg.lstsq(relative, torch.ones(len(rows), 1, dtype=torch.float64)).solution[:, 0]
        return cls(*(found / scale).tolist())

    def seconds(self, row: dict[str, Any]) -> float:
        """The predicted time of a row's step."""
        return sum(a * b for a, b in zip(self, self.terms(row), strict=True))


def config(activation: str, d_sae: int, batch: int, chunk: int) -> Any:
    """The tsae configuration of one measurement."""
    from tsae.config import ObjectiveConfig, OptimizerConfig, SAEConfig, TrainConfig

    sae = SAEConfig(d_in=WIDTH, d_sae=d_sae, k=K, activation=activation)  # type: ignore[arg-type]
    objective = ObjectiveConfig(temporal="multiscale", l1=0.0, hold_steps=0, ramp_steps=0, aux_weight=0.0)
    return TrainConfig(batch=batch, chunk=chunk, steps=100, sae=sae, objective=objective, optimizer=OptimizerConfig())


def ours(activation: str, d_sae: int, batch: int, chunk: int) -> dict[str, float]:
    """Measure steps of `tsae.training.trainer.Trainer`."""
    import torch

    from tsae.data.harvest import ActivationBatch
    from tsae.sae.normalization import InputNormalizer
    from tsae.training.memory import sae_bytes, step_bytes
    from tsae.training.trainer import Trainer

    cfg = config(activation, d_sae, batch, chunk)
    x = torch.randn(batch, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    activations = ActivationBatch(x, torch.zeros(batch, LENGTH, dtype=torch.int32))
    before = status("VmRSS")
    trainer = Trainer(cfg, InputNormalizer.identity(WIDTH), torch.device("cpu"), autocast=True)
    found = measured(lambda: trainer.train_step(activations), before)
    return found | {"expected": float(sae_bytes(cfg.sae) + step_bytes(cfg, autocast=True))}


def sae_lens(d_sae: int, batch: int) -> dict[str, float]:
    """Measure steps of SAELens's `SAETrainer`."""
    import torch

    from benchmarks.peers import sae_lens_topk_step

    x = torch.randn(batch * LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    before = status("VmRSS")
    step = sae_lens_topk_step(WIDTH, d_sae, K, batch * LENGTH, 3e-4, torch.device("cpu"), autocast=True, sparse=False)
    return measured(lambda: step(x), before)


def measured(step: Any, before: int) -> dict[str, float]:
    """Peak resident bytes beyond ``before``, and the median seconds of the steps after the first."""
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"peak": float(status("VmHWM") - before), "seconds": median(seconds[1:])}


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of the measurements."""
    lines = ["| features | trainer | sequences | chunk | peak, GiB | predicted | s/step |", "| --- " * 7 + "|"]
    for row in rows:
        cells = [f"{row['d_sae']:,}", row["trainer"], str(row["batch"]), str(row["chunk"] or "all")]
        if "error" in row:
            cells += [row["error"], "", ""]
        else:
            expected = f"{row['expected'] / 2**30:.2f}" if "expected" in row else ""
            cells += [f"{row['peak'] / 2**30:.2f}", expected, f"{row['seconds']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def fit(rows: list[dict[str, Any]]) -> str:
    """`StepTime` for each tsae activation, with the measured and the predicted time of every row."""
    lines = []
    for trainer in OURS:
        measured_rows = [row for row in rows if row["trainer"] == trainer and "seconds" in row]
        if len(measured_rows) < len(StepTime._fields):
            continue
        found = StepTime.fitted(measured_rows)
        lines.append(f"{trainer}: " + ", ".join(f"{name} {1e12 * x:.1f} ps" for name, x in found._asdict().items()))
        for row in measured_rows:
            size = f"{row['d_sae']:>9,} features, {row['batch']:2} sequences, chunk {row['chunk'] or 'all':>3}"
            lines.append(f"  {size}: {row['seconds']:5.1f} s, predicted {found.seconds(row):5.1f}")
    return "\n".join(lines)


def main() -> None:
    """Run every measurement in its own process and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[16_384, 65_536], help="features")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--chunk", type=int, nargs="+", default=[0, 2], help="sequences per chunk; 0: full batch")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trainers", nargs="+", default=[*OURS, PEER])
    parser.add_argument("--fit", type=Path, metavar="FILE", help="fit the time formula to the output of --json")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.fit:
        print(fit(json.loads(arguments.fit.read_text())))
        return
    if arguments.one:
        trainer, (d_sae, batch, chunk) = arguments.one[0], map(int, arguments.one[1:])
        found = sae_lens(d_sae, batch) if trainer == PEER else ours(trainer, d_sae, batch, chunk)
        print(json.dumps(found))
        return
    rows: list[dict[str, Any]] = []
    for d_sae in arguments.sizes:
        for trainer in arguments.trainers:
            for chunk in (0,) if trainer == PEER else arguments.chunk:
                command = [sys.executable, "-m", "benchmarks.large_dictionary"]
                command += ["--one", trainer, *map(str, (d_sae, arguments.batch, chunk))]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
                row = {"d_sae": d_sae, "trainer": trainer, "batch": arguments.batch, "chunk": chunk}
                if done.returncode:
                    row["error"] = f"exit code {done.returncode}"
                else:
                    row |= json.loads(done.stdout.splitlines()[-1])
                rows.append(row)
                print(row, file=sys.stderr)
    print(table(rows))
    if arguments.json:
        arguments.json.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    main()
