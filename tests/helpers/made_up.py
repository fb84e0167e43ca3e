"""A synthetic run directory and features, for pages without a language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tsae.config import SAEConfig, TrainConfig
from tsae.sae.model import SparseAutoencoder
from tsae.view.data import page_data
from tsae.view.features import Activity

HOSTILE = [
    "</script><script>window.pwned = 1</script>",
    '<img src=x onerror="window.pwned = 2">',
    "&lt;b&gt;",
    "\u2028",
]


def evaluation() -> dict[str, Any]:
    return {
        "explained_variance": 0.91,
        "l0": 32.0,
        "frac_alive": 0.97,
        "ce_loss_score_mean_ablation": 0.95,
        "temporal": {
            "total_bits": 313.9,
            "support_bits": 187.6,
            "support_bits_memoryless": 215.2,
            "persistence_excess": 0.31,
            "persistence_excess_shuffled": 0.09,
        },
    }


def write_run(folder: Path, steps: int = 200) -> Path:
    """A run directory with a training log and an evaluation, and without an autoencoder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(1, steps + 1):
        values = {
            "step": step,
            "tokens": 1024 * step,
            "reconstruction": 3 / step + 0.08,
            "sparsity": 0.0,
            "temporal": 1e-3 * min(step, 50) / 50,
            "auxiliary": 0.02 / step,
            "explained_variance": 0.92 - 2 / step,
            "l0": 32 + 40 / step,
            "dead": step // 4,
            "lag1_correlation": 0.2,
            "lag1_correlation_p10": 0.05,
            "lag1_correlation_p90": 0.4,
        }
        lines.append(json.dumps(values) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "eval.json").write_text(json.dumps(evaluation()))
    return folder


def made_up_activity(d_sae: int, sequences: int, T: int = 128, on: float = 0.005, seed: int = 0) -> Activity:
    """Features that switch on at random for a few tokens; each even one is followed by an odd one."""
    generator = torch.Generator().manual_seed(seed)
    activity = Activity(d_sae, T)
    for start in range(0, sequences, 16):
        n = min(16, sequences - start)
        h = torch.zeros(n, T, d_sae)
        state = torch.zeros(n, d_sae)
        stay = torch.linspace(0.2, 0.9, d_sae)
        for t in range(T):
            draws = torch.rand(n, d_sae, generator=generator)
            state = torch.where(state > 0, (draws < stay).float(), (draws < on).float())
            h[:, t] = state * (3 + 4 * torch.rand(n, d_sae, generator=generator))
        h[:, 2:, 1::2] += h[:, :-2, 0 : d_sae // 2 * 2 : 2][..., : d_sae // 2]
        h[..., -1] = 0  # one that never fires
        segments = torch.zeros(n, T, dtype=torch.int32)
        segments[:, T // 2 :] = 1
        segments[0, T // 2 : T // 2 + 2] = -1
        activity.update(h, segments)
    activity.finish()
    return activity


def made_up_page(
    folder: Path,
    d_sae: int = 40,
    sequences: int = 24,
    *,
    hostile: bool = False,
    on: float = 0.005,
    activation: str = "schmitt",
    T: int = 128,
) -> dict[str, Any]:
    """The content of a page about a run in `folder`, on sequences of `T` tokens."""
    run = write_run(folder)
    cfg = TrainConfig(data="river.txt", sae=SAEConfig(d_in=8, d_sae=d_sae, k=min(32, d_sae), activation=activation))
    sae = SparseAutoencoder(cfg.sae).eval()
    sae.threshold.fill_(4.0)
    sae.release.fill_(1.2)
    activity = made_up_activity(d_sae, sequences, T, on=on)
    texts = [" the", " river", " ran", " under", " a", " stone", " bridge", ".", "\n", " and", " children"]
    texts += HOSTILE if hostile else []
    ids = np.random.default_rng(0).integers(len(texts), size=activity.segments.numel())
    return page_data(run, cfg, sae, activity, ids, texts)
