"""Thresholds of the sparse activations: per token, per batch, and steered to a target L0.

The kernels compute all of these activations as a ReLU with a threshold, and with a release for hysteresis.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsae.parallel.axis import SINGLE_PROCESS, Axis, Ranks
from tsae.parallel.selection import kth_largest, kth_largest_per_row, kth_largest_without_waiting
from tsae.utils.device import runs_behind


def topk_threshold(pre: Tensor, bias: Tensor | None, k: int, features: Axis = SINGLE_PROCESS.features) -> Tensor:
    """The per-token threshold that exactly k features exceed, except for ties (Gao et al. 2024, equation 4).

    pre: (B, T, d_sae); bias: (d_sae) or None; this rank's shard if the dictionary is split over ``features``
    out: (B, T, 1), the (k + 1)-th largest value of ``pre + bias``, no gradient
    """
    values = pre.detach() if bias is None else pre.detach() + bias.detach().to(pre.dtype)
    if k >= values.shape[-1] * features.size:
        return torch.full_like(values[..., :1], torch.finfo(values.dtype).min)
    return kth_largest_per_row(values, k + 1, features)


def batch_topk_threshold(
    pre: Tensor,
    bias: Tensor | None,
    k: int,
    segments: Tensor | None,
    ranks: Ranks = SINGLE_PROCESS,
    candidates: int | None = None,
) -> Tensor:
    """The threshold that k features per token exceed on average over the batch (Bussmann et al. 2024).

    pre: (B, T, d_sae); bias: (d_sae) or None; positions with negative segment ids do not count
    ranks: if there are several, ``pre`` is this rank's shard, and the threshold is for the global batch and dictionary
    candidates: on a GPU, see `threshold_without_waiting`
    out: scalar, no gradient
    """
    values = pre.detach() if bias is None else pre.detach() + bias.detach().to(pre.dtype)
    lowest = torch.finfo(values.dtype).min
    if runs_behind(values.device):
        return threshold_without_waiting(values, segments, k, ranks, lowest, candidates)
    values = included(values, segments)  # rebound, so that one tensor [B, T, d_sae] is held and not two
    return threshold_for(values, k, ranks, lowest)


def included(values: Tensor, segments: Tensor | None) -> Tensor:
    """The rows [n, d_sae] of ``values`` (B, T, d_sae) at non-excluded positions."""
    return values.flatten(0, 1) if segments is None else values[segments >= 0]


def threshold_for(values: Tensor, k: int, ranks: Ranks, lowest: float) -> Tensor:
    """The threshold that k values per row exceed on average: the (k n + 1)-th largest value; a scalar.

    values: (n, d_sae), from `included`; ranks: as in `batch_topk_threshold`; lowest: the threshold if all may pass
    """
    tokens = int(ranks.data.sum_no_grad(torch.tensor(len(values))))
    if tokens == 0 or k >= values.shape[1] * ranks.features.size:
        return values.new_full((), lowest)
    return kth_largest(values, tokens * k + 1, ranks.world)


def threshold_without_waiting(
    values: Tensor,
    segments: Tensor | None,
    k: int,
    ranks: Ranks,
    lowest: float,
    candidates: int | None = None,
) -> Tensor:
    """`threshold_for` of ``values`` (B, T, d_sae), for a device that the host must not wait for.

    candidates: look at so many of a token's largest values only, which is less work. The result is the same if no token
        has more above it; else it is lower, so that this can be seen from the number of features above it.
    """
    if k >= values.shape[-1] * ranks.features.size:
        return values.new_full((), lowest)
    kept = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device) if segments is None else segments >= 0
    tokens = ranks.data.sum_no_grad(kept.sum())
    if candidates is not None and k <= candidates < values.shape[-1]:
        values = values.topk(candidates, dim=-1, sorted=False).values
    kth = kth_largest_without_waiting(values, kept, tokens * k + 1, ranks.world)
    return torch.where(tokens > 0, kth, lowest)


def mean_l0(h: Tensor, segments: Tensor | None = None, ranks: Ranks = SINGLE_PROCESS) -> Tensor:
    """Mean number of features above 0, over positions that are not excluded.

    h: (B, T, d_sae), any float dtype (on a CPU, NaN counts as active); segments: (B, T) or None
    ranks: if there are several, ``h`` is this rank's shard, and the mean is over the global batch and dictionary
    out: scalar float32
    """
    # Equal except for NaN; on a CPU, comparing bfloat16 takes over twice as long as relu and bool (torch 2.13).
    above = h.relu().bool() if h.device.type == "cpu" else h > 0
    active = _count(above)  # [B, T]
    kept = torch.ones_like(active, dtype=torch.bool) if segments is None else segments >= 0
    return ranks.world.sum_no_grad((active * kept).sum()) / ranks.data.sum_no_grad(kept.sum()).clamp(min=1)


def _count(mask: Tensor) -> Tensor:
    """``mask.sum(-1, dtype=torch.float32)``, faster on a CPU, where that converts every entry first.

    Eight bytes are added at a time as one int64, and at most 255 of these, so that no byte carries into the next.
    """
    words, rest = divmod(mask.shape[-1], 8)
    together = max((n for n in range(1, 256) if words % n == 0), default=1)
    if mask.device.type != "cpu" or rest or not words or together < 16 or not mask.is_contiguous():
        return mask.sum(-1, dtype=torch.float32)
    sums = mask.view(torch.int64).unflatten(-1, (-1, together)).sum(-1)
    return sums.view(torch.uint8).sum(-1, dtype=torch.float32)


def initial_threshold(
    pre: Tensor, bias: Tensor | None, k: int, segments: Tensor | None = None, ranks: Ranks = SINGLE_PROCESS
) -> Tensor:
    """The start of a steered threshold: k features per token on average without hysteresis, and at least 0."""
    return batch_topk_threshold(pre, bias, k, segments, ranks).float().clamp(min=0.0)


class ThresholdController:
    """Steers a threshold so that the mean L0 meets a target.

    ``theta <- theta * exp(gain * clip(L0 / target - 1, -1, 1))`` after every step. Inference uses an exponential
    moving average of log theta, which averages out the noise of single batches.

    Args:
        target: mean number of active features per token.
        gain: step size on log theta.
        decay: of the moving average.
    """

    def __init__(self, target: float, gain: float = 0.3, decay: float = 0.95) -> None:
        self.target, self.gain, self.decay = target, gain, decay
        self.theta = torch.zeros(())
        self.log_mean = torch.zeros(())

    @property
    def started(self) -> bool:
        """Whether `start` or `load_state_dict` has set the threshold."""
        return bool(self.theta > 0)

    def start(self, theta: Tensor) -> None:
        """Set the threshold, a positive scalar tensor."""
        self.theta = theta.detach().float().clamp(min=1e-6).clone()
        self.log_mean = self.theta.log()

    def update(self, l0: Tensor) -> Tensor:
        """One step of control; ``l0`` and the new threshold are scalars. Does not synchronize the device."""
        error = (l0.float() / self.target - 1.0).clamp(-1.0, 1.0)
        # In place, as all state that a step changes, so that a CUDA graph of the step finds it where it was.
        self.theta.copy_(self.theta * torch.exp(self.gain * error))
        self.log_mean.copy_(self.decay * self.log_mean + (1.0 - self.decay) * self.theta.log())
        return self.theta

    @property
    def frozen(self) -> Tensor:
        """The threshold for inference, a scalar."""
        return self.log_mean.exp()

    def state_dict(self) -> dict[str, Tensor]:
        """The state to resume from."""
        return {"theta": self.theta, "log_mean": self.log_mean}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Resume from a `state_dict`."""
        self.theta, self.log_mean = state["theta"].clone(), state["log_mean"].clone()
