"""Memory and disk use of a run, from its configuration and the language model."""

from __future__ import annotations

import os

import torch

from tsae.config import SAEConfig, TrainConfig
from tsae.data.buffer import ActivationBuffer
from tsae.data.cache import SHARD_BYTES, sequence_bytes
from tsae.errors import UserError
from tsae.lm.loading import LanguageModel
from tsae.lm.trial_run import width as stored_width
from tsae.training.objectives import bands_for
from tsae_kernels.sparse import sparse_products_available

MODEL, BUFFER, AHEAD, SAE, STEP, CACHE = (
    "language model",
    "activation buffer",
    "activations harvested ahead",
    "autoencoder with gradients and Adam",
    "activations of a step",
    "cache shard being written",
)


def memory_parts(
    cfgs: dict[str, TrainConfig],
    lm: LanguageModel,
    buffer: ActivationBuffer,
    storage: torch.dtype,
    device: torch.device,
    *,
    autocast: bool,
) -> dict[str, int]:
    """Bytes by part: exact for the language model and the buffers, estimates for the autoencoders and their steps.

    Libraries and a forward pass of the language model are not counted.

    device: of the autoencoders
    """
    cfg = next(iter(cfgs.values()))
    width = stored_width(lm, cfg.place, cfg.target_place)
    dense = device.type != "cpu" or not sparse_products_available()
    parts = {
        MODEL: sum(tensor.nbytes for tensor in (*lm.model.parameters(), *lm.model.buffers())),
        BUFFER: buffer.memory(cfg.length, width, storage),
        SAE: sum(sae_bytes(each.sae) for each in cfgs.values()),
        STEP: max(step_bytes(each, autocast=autocast, dense=dense) for each in cfgs.values()),
    }
    if ahead := cfg.buffer.prefetched(_sequences(cfg), gpu=lm.device.type == "cuda"):
        parts[AHEAD] = ahead * sequence_bytes(cfg.length, width, storage)
    if cfg.cache is not None:  # the groups of a shard, and their copy in file order
        parts[CACHE] = 2 * min(SHARD_BYTES, cache_bytes(cfg, width, storage))
    return parts


def check_memory(parts: dict[str, int], device: torch.device, lm_device: torch.device) -> None:
    """Raise `UserError` if `memory_parts` does not fit in the machine's memory.

    device, lm_device: of the autoencoder and of the language model; what is on a GPU does not count
    """
    elsewhere = {MODEL} if lm_device.type != "cpu" else set()
    elsewhere |= {SAE, STEP} if device.type != "cpu" else set()
    counted = {name: size for name, size in parts.items() if name not in elsewhere}
    needed, available = sum(counted.values()), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        largest = max(counted, key=lambda name: counted[name])
        raise UserError(
            f"The run needs about {needed / 2**20:,.0f} MiB of memory ({largest}: {counted[largest] / 2**20:,.0f}), "
            f"and this machine has {available / 2**20:,.0f}; lower sae.d_sae, batch or buffer.sequences."
        )


def sae_parameters(cfg: SAEConfig) -> int:
    """Number of parameters."""
    per_feature = 1 + cfg.kind.threshold_parameters + cfg.kind.recurrent
    return (cfg.d_in + cfg.width_out + per_feature) * cfg.d_sae + cfg.width_out


def sae_bytes(cfg: SAEConfig) -> int:
    """Bytes of parameters, gradients, Adam's two moments and buffers (thresholds, rates, decays), all float32."""
    buffers = (2 + cfg.kind.recurrent) * cfg.d_sae + (2 * cfg.d_sae + 1 if cfg.kind.rates else 0)
    return 4 * (4 * sae_parameters(cfg) + buffers)


def step_bytes(cfg: TrainConfig, *, autocast: bool, dense: bool = False) -> int:
    """Estimated peak of a training step beyond `sae_bytes`.

    The forward pass holds ``Kind.feature_tensors`` tensors [B, T, d_sae]: the pre-activation, the features, their
    gradients and more. It holds three tensors [B, T, d_in] and three [B, T, d_out] (input, target, reconstruction,
    residual, normalization), under autocast the weights in bfloat16, and the statistics and their gradient, which weigh
    in short sequences. Before the first piece of a chunked batch (``cfg.chunk``) there are no gradients of the weights
    yet. At its end the backward pass holds these, one gradient not yet accumulated or cast, and the features with their
    gradient. AuxK, Matryoshka prefixes, and temporal terms beyond the statistics are not counted.

    dense: matrix products are dense, as on a GPU (where this was not measured): all feature tensors and the bfloat16
        weights are then assumed to last until the end of the backward pass
    """
    sequences = min(cfg.chunk or cfg.batch, cfg.batch)
    tokens, width = sequences * cfg.length, 2 if autocast else 4
    statistics = sequences * (2 * len(bands_for(cfg.objective)) + 2) * 4 * cfg.sae.d_sae
    features, weights = tokens * width * cfg.sae.d_sae, cfg.sae.d_in * cfg.sae.d_sae
    kind = cfg.sae.kind
    forward = backward = kind.feature_tensors[autocast]
    if cfg.sae.uses_gate_gradient:  # the features with marks, and the entries near a threshold
        forward = backward = forward + (4 if autocast else 2)
    if kind.k_sparse and not kind.learned and not kind.recurrent and not dense:
        backward = 2  # the backward pass of sparse products frees the others early
    gradients = 0 if 0 < cfg.chunk < cfg.batch else 8 * weights  # not yet there in the forward pass
    peaks = (
        forward * features + 2 * autocast * (1 + dense) * weights - gradients,
        backward * features + 4 * (1 + autocast * dense) * weights,
    )
    return tokens * 3 * 4 * (cfg.sae.d_in + cfg.sae.width_out) + statistics + max(peaks)


def cache_bytes(cfg: TrainConfig, width: int, storage: torch.dtype) -> int:
    """Bytes of the activation cache that a run fills, without the headers of shards."""
    sequences = _sequences(cfg)
    group = min(cfg.buffer.harvest_batch, sequences)
    return -(-sequences // group) * group * sequence_bytes(cfg.length, width, storage)


def checkpoint_bytes(cfgs: dict[str, TrainConfig], buffer: ActivationBuffer, width: int, storage: torch.dtype) -> int:
    """Peak bytes of the checkpoints, reached while a new one is written beside those that are kept.

    Each holds the weights, Adam's moments and the buffer. Checkpoints share one buffer file if it never refills.
    """
    cfg = next(iter(cfgs.values()))
    state = sum(4 * (3 * sae_parameters(each.sae) + 5 * each.sae.d_sae) for each in cfgs.values())
    checkpoints = cfg.checkpoint.keep + 1
    buffers = 1 if buffer.capacity >= _sequences(cfg) else checkpoints
    return checkpoints * state + buffers * buffer.memory(cfg.length, width, storage)


def _sequences(cfg: TrainConfig) -> int:
    """Sequences that a run harvests."""
    return -(-cfg.steps * cfg.batch // cfg.buffer.reuse)
