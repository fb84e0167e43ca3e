"""What a run takes in memory and on disk, from its configuration and the language model alone."""

from __future__ import annotations

import os

import torch

from tsae.config import LENGTH, SAEConfig, TrainConfig
from tsae.data.buffer import ActivationBuffer
from tsae.data.cache import SHARD_BYTES, sequence_bytes
from tsae.errors import UserError
from tsae.lm.loading import LanguageModel
from tsae_kernels.sparse import sparse_products_available

MODEL, BUFFER, AHEAD, SAE, STEP, CACHE = (
    "language model",
    "activation buffer",
    "activations harvested ahead",
    "autoencoder with gradients and Adam",
    "activations of a step",
    "cache shard in hand",
)


# Tensors [B, T, d_sae] at the peak of a step, without and with autocast, counted with torch's memory profiler on a CPU
# (tests/training/test_dry_run.py); (4, 5) for the activations that are not here.
_FEATURE_TENSORS = {"batchtopk": (5, 7), "jumprelu": (5, 7), "jumprelu_schmitt": (8, 13)}
_SPARSE = ("topk", "batchtopk", "schmitt")  # whose backward pass, where it skips zeros, holds few of them at its end
_LEARNED = {"jumprelu": 1, "jumprelu_schmitt": 2}  # thresholds that are learned, per feature


def memory_parts(
    cfgs: dict[str, TrainConfig],
    lm: LanguageModel,
    buffer: ActivationBuffer,
    storage: torch.dtype,
    *,
    autocast: bool,
) -> dict[str, int]:
    """Bytes by part. The first three are exact and held throughout; the others are estimates of what comes on top.

    What the libraries themselves and one forward pass of the language model take is not counted.
    """
    cfg = next(iter(cfgs.values()))
    dense = lm.device.type != "cpu" or not sparse_products_available()
    parts = {
        MODEL: sum(tensor.nbytes for tensor in (*lm.model.parameters(), *lm.model.buffers())),
        BUFFER: buffer.memory(LENGTH, lm.d_model, storage),
        SAE: sum(sae_bytes(each.sae) for each in cfgs.values()),
        STEP: max(step_bytes(each, autocast=autocast, dense=dense) for each in cfgs.values()),
    }
    wanted = -(-cfg.steps * cfg.batch // cfg.buffer.reuse)
    if ahead := cfg.buffer.prefetched(wanted, gpu=lm.device.type == "cuda"):
        parts[AHEAD] = ahead * sequence_bytes(LENGTH, lm.d_model, storage)
    if cfg.cache is not None:  # the groups of a shard, and their copy in the file's order
        parts[CACHE] = 2 * min(SHARD_BYTES, cache_bytes(cfg, lm.d_model, storage))
    return parts


def check_memory(parts: dict[str, int], device: torch.device) -> None:
    """Raise `UserError` if what `memory_parts` counts, of it what lies in the machine's memory, exceeds that memory."""
    here = parts if device.type == "cpu" else {name: parts.get(name, 0) for name in (BUFFER, CACHE)}
    needed, there = sum(here.values()), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        largest = max(here, key=lambda name: here[name])
        raise UserError(
            f"The run needs about {needed / 2**20:,.0f} MiB of memory ({largest}: {here[largest] / 2**20:,.0f}), and "
            f"this machine has {there / 2**20:,.0f}; lower sae.d_sae, batch or buffer.sequences."
        )


def sae_parameters(cfg: SAEConfig) -> int:
    """Numbers that are trained."""
    learned = _LEARNED.get(cfg.activation, 0)
    return 2 * cfg.d_in * cfg.d_sae + cfg.d_in + (1 + learned) * cfg.d_sae


def sae_bytes(cfg: SAEConfig) -> int:
    """Weights, gradients and Adam's two moments, float32, and the buffers of thresholds."""
    return 4 * (4 * sae_parameters(cfg) + 2 * cfg.d_sae)


def step_bytes(cfg: TrainConfig, *, autocast: bool, dense: bool = False) -> int:
    """About what a training step has at its peak beyond `sae_bytes`.

    dense: whether products are dense, as on a GPU (not measured there): all features and the bfloat16 weights are then
        taken to last to the end of the backward pass

    Of every token: the pre-activation, the features, the gradient of each and what `_FEATURE_TENSORS` counts further,
    and of the width of the language model the input, the reconstruction, their difference and what the normalization
    makes of them. That is the forward pass, which has weights in bfloat16, too, but before the first piece
    (``cfg.chunk``) no gradients of them. The backward pass ends with those, one more that is not yet added or cast, and
    the features and their gradient. AuxK, Matryoshka prefixes and temporal terms other than the statistics come on top.
    """
    tokens, width = min(cfg.chunk or cfg.batch, cfg.batch) * LENGTH, 2 if autocast else 4
    features, weights = tokens * width * cfg.sae.d_sae, cfg.sae.d_in * cfg.sae.d_sae
    forward = backward = _FEATURE_TENSORS.get(cfg.sae.activation, (4, 5))[autocast]
    if cfg.sae.activation in _SPARSE and not dense:
        backward = 2
    gradients = 0 if 0 < cfg.chunk < cfg.batch else 8 * weights  # that the forward pass does not have
    peaks = (
        forward * features + 2 * autocast * (1 + dense) * weights - gradients,
        backward * features + 4 * (1 + autocast * dense) * weights,
    )
    return tokens * 6 * 4 * cfg.sae.d_in + max(peaks)


def cache_bytes(cfg: TrainConfig, d_model: int, storage: torch.dtype) -> int:
    """Bytes of the cache that a run fills on its own, up to the shards' headers."""
    sequences = -(-cfg.steps * cfg.batch // cfg.buffer.reuse)
    group = min(cfg.buffer.harvest_batch, sequences)
    return -(-sequences // group) * group * sequence_bytes(LENGTH, d_model, storage)


def checkpoint_bytes(cfgs: dict[str, TrainConfig], buffer: ActivationBuffer, d_model: int, storage: torch.dtype) -> int:
    """Bytes of the checkpoints at most, while one more than are kept is written.

    Each has the weights and Adam's moments, and the buffer as it then was: one file for all where it never refills.
    """
    cfg = next(iter(cfgs.values()))
    state = sum(4 * (3 * sae_parameters(each.sae) + 5 * each.sae.d_sae) for each in cfgs.values())
    whole = -(-cfg.steps * cfg.batch // cfg.buffer.reuse)
    buffers = 1 if buffer.capacity >= whole else cfg.checkpoint.keep + 1
    return (cfg.checkpoint.keep + 1) * state + buffers * buffer.memory(LENGTH, d_model, storage)
