"""Small runs of the main job for tests: their options, their text, and readers of their output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

TEXT = (
    "the river ran under a stone bridge and children threw leaves from it to see whose would come out first on the"
    " other side where an old man sat reading his paper in the sun as he had done every day for years"
)
WORDS = TEXT.split()


def write_text(path: Path) -> Path:
    """1,500 paragraphs of random words."""
    generator = torch.Generator().manual_seed(0)
    paragraphs = []
    for _ in range(1500):
        picks = torch.randint(len(WORDS), (40,), generator=generator).tolist()
        paragraphs.append(" ".join(WORDS[i] for i in picks) + ".\n\n")
    path.write_text("".join(paragraphs), encoding="utf-8")
    return path


def options(model: Path, text: Path, out: Path, *more: str, preset: str = "demo") -> list[str]:
    base = f"""{preset} --model {model} --data {text} --out {out} --layer 1 --steps 12 --batch 4 --log-every 3
        --device cpu --sae.d-sae 48 --sae.k 6 --buffer.sequences 24 --buffer.harvest-batch 8 --buffer.reuse 1
        --buffer.estimate-sequences 16 --checkpoint.every 4 --evaluation.sequences 8 --evaluation.ce-sequences 4
        --text.column None --text.evaluation-share 0.2"""
    return base.split() + list(more)


def run_options(model: Path, text: Path, out: Path) -> list[str]:
    """Turns on everything that has state: noise, temporal loss, dead features, a buffer that refills."""
    more = "--steps 24 --optimizer.noise-eta 0.1 --optimizer.clip-norm 2 --objective.hold-steps 4"
    more += " --objective.ramp-steps 4 --objective.dead-after-tokens 600 --evaluation.no-final"
    more += " --sae.d-sae 96 --sae.k 1 --objective contrastive+window"  # few enough active that some die
    return options(model, text, out, *more.split())


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package catches it."""


def die() -> None:
    raise Killed


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def leaves(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [leaf for inner in value.values() for leaf in leaves(inner)]
    return [value]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "sae" / "sae_weights.safetensors")


def same(a: Path, b: Path) -> None:
    """Assert that two runs have bitwise equal weights and the same log, timing aside."""
    for name, tensor in weights(a).items():
        assert torch.equal(tensor, weights(b)[name]), name
    timing = "tokens_per_second"
    first, second = ([{k: v for k, v in x.items() if k != timing} for x in lines(p / "metrics.jsonl")] for p in (a, b))
    assert first == second
