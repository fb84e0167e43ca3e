"""Steps of `Trainer` on made-up activations, in one process or in several."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tsae.config import TrainConfig
from tsae.data.harvest import ActivationBatch
from tsae.parallel.axis import SINGLE_PROCESS, Ranks
from tsae.parallel.buffer import BatchShard
from tsae.parallel.processes import make_ranks
from tsae.sae.normalization import InputNormalizer
from tsae.training.trainer import Trainer
from tsae.utils.config_json import from_dict, to_dict

STEPS, BATCH, LENGTH, WIDTH = 50, 7, 24, 16  # 7: shares of different sizes

# Changes to `BASE`. Together the runs pass through every reduction across processes.
BASE: dict[str, Any] = {
    "sae": {"d_in": WIDTH, "d_sae": 48, "k": 6},
    "objective": {"temporal": "none", "hold_steps": 5, "ramp_steps": 5, "l1": 0.0, "aux_weight": 0.0},
    "optimizer": {"lr": 1e-3},
    "steps": STEPS,
}
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "schmitt, multiscale+contrastive+window": {
        "objective": {"temporal": "multiscale+contrastive+window", "pairs": 40, "weight": 0.1, "group": 30}
    },
    "batchtopk, slow, noise": {
        "sae": {"activation": "batchtopk"},
        "objective": {"temporal": "slow", "slow_weight": 0.1, "offset": 2},
        "optimizer": {"noise_eta": 0.01},
    },
    "topk, matryoshka, AuxK, contrastive": {
        "sae": {"activation": "topk", "groups": [10, 30, 48], "k": 1},
        "objective": {
            "temporal": "contrastive",
            "pairs": 0,
            "negatives": "other-sequences",
            "aux_weight": 0.1,
            "aux_k": 4,
            "dead_after_tokens": 600,
        },
    },
    "relu, L1, terms of few features, AdamW": {
        "sae": {"activation": "relu"},
        "objective": {"temporal": "multiscale+window+contrastive", "adaptive": False, "group": 20, "l1": 0.04},
        "optimizer": {"name": "adamw", "clip_norm": 0.5},
    },
    "jumprelu, slow": {"sae": {"activation": "jumprelu"}, "objective": {"temporal": "slow", "slow_weight": 0.1}},
    "jumprelu_schmitt, L0": {"sae": {"activation": "jumprelu_schmitt"}, "objective": {"l0": 0.01}},
    "rate, gate, window": {
        "sae": {"activation": "rate", "gate_gradient": 0.2},
        "objective": {"temporal": "window"},
    },
    "rate, support bits, matryoshka": {
        "sae": {"activation": "rate", "gate_gradient": 0.2, "support_bits": 20.0, "groups": [10, 30, 48]},
        "objective": {"temporal": "window"},
    },
    "schmitt, exact, window": {"sae": {"steering": "exact"}, "objective": {"temporal": "window"}},
}


def config(name: str) -> TrainConfig:
    values = to_dict(TrainConfig())
    for changes in (BASE, RUNS[name]):
        for key, value in changes.items():
            values[key] = values[key] | value if isinstance(value, dict) else value
    return from_dict(TrainConfig, values)


def batches(count: int) -> list[ActivationBatch]:
    """Slowly changing activations with a large mean; documents of random lengths, some positions excluded."""
    generator = torch.Generator().manual_seed(5)
    directions = torch.randn(40, WIDTH, generator=generator)
    out = []
    for _ in range(count):
        on = (torch.rand(BATCH, LENGTH // 4, 40, generator=generator) < 0.1).float().repeat_interleave(4, 1)
        x = (on * torch.rand(on.shape, generator=generator)) @ directions + 20.0
        segments = (torch.rand(BATCH, LENGTH, generator=generator) < 0.1).int().cumsum(1).int()
        segments[torch.rand(BATCH, LENGTH, generator=generator) < 0.05] = -1
        out.append(ActivationBatch(x, segments))
    return out


def share(batch: ActivationBatch, ranks: Ranks) -> ActivationBatch | BatchShard:
    if ranks.world.size == 1:
        return batch
    first, last = ranks.data.shard_bounds(len(batch.x))
    return BatchShard(batch.x[first:last], batch.segments[first:last], batch.segments, first)


def trained(
    name: str, ranks: Ranks = SINGLE_PROCESS, features: int = 1
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """What was measured at every step, and at the first process the finished weights."""
    cfg = config(name)
    cfg = replace(cfg, parallel=replace(cfg.parallel, features=features))
    cfg.check()
    data = batches(STEPS)
    trainer = Trainer(cfg, InputNormalizer.estimate(*data[0]), torch.device("cpu"), autocast=False, ranks=ranks)
    measured = [trainer.train_step(share(batch, ranks), log=True) for batch in data]
    trainer.check_finite()
    return measured, trainer.finished().state_dict()


def train_all(out: Path, features: list[int]) -> None:
    """In each process: every run of `RUNS` for each number of parts of the dictionary.

    Writes the measurements of every step to ``out`` and the finished weights beside it.
    """
    dist.init_process_group("gloo")
    results = {}
    for parts in features:
        ranks = make_ranks(parts, "cpu")
        for name in RUNS:
            measured, weights = trained(name, ranks, parts)
            results[f"{parts}: {name}"] = (measured, weights)
    if dist.get_rank() == 0:
        torch.save({name: weights for name, (_, weights) in results.items()}, out.with_suffix(".pt"))
        out.write_text(json.dumps({name: measured for name, (measured, _) in results.items()}))
    dist.destroy_process_group()


def record_reductions(out: Path, chunk: int) -> None:
    """In each process, one step: per asynchronous reduction, its piece and the parameters without a gradient so far."""
    dist.init_process_group("gloo")
    ranks = make_ranks(1, "cpu")
    cfg = replace(config("schmitt, multiscale+contrastive+window"), chunk=chunk)
    batch = batches(1)[0]
    batch = ActivationBatch(batch.x[:6], batch.segments[:6])  # shares of 3 sequences
    trainer = Trainer(cfg, InputNormalizer.estimate(*batch), torch.device("cpu"), autocast=False, ranks=ranks)
    parameters = trainer.sae.parameter_dict()
    backward_passes, found, reduce = 0, [], dist.all_reduce

    def note(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        if options.get("async_op"):
            missing = [name for name, parameter in parameters.items() if parameter.grad is None]
            found.append([backward_passes, missing])
        return reduce(tensor, *arguments, **options)

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal backward_passes
        backward_passes += 1
        return backward(*arguments, **options)

    backward, dist.all_reduce = trainer._backward, note
    trainer._backward = counted  # type: ignore[method-assign]
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.train_step(share(batch, ranks))
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":  # a rank of torchrun
    train_all(Path(sys.argv[1]), [int(argument) for argument in sys.argv[2:]])
