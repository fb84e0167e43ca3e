"""Thresholds of the sparse activations: per token, per batch, and steered to a target sparsity.

Every activation reaches the kernels in one form, `relu` with a threshold and perhaps a release, so this file
only has to say what the threshold is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsae.parallel.axis import SINGLE_PROCESS, Axis, Ranks
from tsae.parallel.selection import kth_largest, kth_largest_per_row


def topk_threshold(pre: Tensor, bias: Tensor | None, k: int, features: Axis | None = None) -> Tensor:
    """The per-token threshold that ``pre + bias > threshold`` passes for exactly k features, ties apart.

    pre: (B, T, d_sae); bias: (d_sae) or None; of a dictionary that is split over ``features``, this process's part
    out: (B, T, 1), no gradient: the (k + 1)-th largest value (Gao et al. 2024, equation 4)
    """
    values = pre.detach() if bias is None else pre.detach() + bias.detach().to(pre.dtype)
    parts = 1 if features is None else features.size
    if k >= values.shape[-1] * parts:
        return torch.full_like(values[..., :1], torch.finfo(values.dtype).min)
    if features is not None and parts > 1:
        return kth_largest_per_row(values, k + 1, features)
    return values.topk(k + 1, dim=-1, sorted=True).values[..., k:]


def batch_topk_threshold(
    pre: Tensor, bias: Tensor | None, k: int, segments: Tensor | None, ranks: Ranks = SINGLE_PROCESS
) -> Tensor:
    """The one threshold that passes k features a token on average over the batch (Bussmann et al. 2024).

    pre: (B, T, d_sae); bias: (d_sae) or None; positions of negative segment id do not count
    ranks: with several, ``pre`` is a share of the batch and the dictionary, and the threshold that of the whole
    out: scalar, no gradient
    """
    values = pre.detach() if bias is None else pre.detach() + bias.detach().to(pre.dtype)
    values = values.flatten(0, 1) if segments is None else values[segments >= 0]
    return threshold_for(values, k, ranks, torch.finfo(values.dtype).min)


def threshold_for(values: Tensor, k: int, ranks: Ranks, everything: float) -> Tensor:
    """The threshold that passes k of every row's values on average: the (k rows + 1)-th largest of all.

    values: (rows, d_sae), this process's share; everything: what stands for it where all pass
    out: scalar
    """
    tokens, d_sae = values.shape
    if ranks.world.size > 1:
        tokens = int(ranks.data.sum_no_grad(torch.tensor(tokens)))
        d_sae *= ranks.features.size
    if tokens == 0 or k >= d_sae:
        return values.new_full((), everything)
    if ranks.world.size > 1:
        return kth_largest(values, tokens * k + 1, ranks.world)
    return values.flatten().kthvalue(tokens * (d_sae - k)).values


def mean_l0(h: Tensor, segments: Tensor | None = None, ranks: Ranks = SINGLE_PROCESS) -> Tensor:
    """Mean number of features above 0 per position that is not excluded.

    h: (B, T, d_sae), any float dtype; segments: (B, T) or None. On a CPU a NaN counts, too.
    ranks: with several, ``h`` is a share and the mean that of the whole batch and dictionary
    out: scalar float32
    """
    # The same but for NaN; on a CPU a comparison of bfloat16 took more than twice as long as the two (torch 2.13).
    above = h.relu().bool() if h.device.type == "cpu" else h > 0
    active = _count(above)  # [B, T]
    if segments is None and ranks.world.size == 1:
        return active.mean()
    kept = torch.ones_like(active, dtype=torch.bool) if segments is None else segments >= 0
    return ranks.world.sum_no_grad((active * kept).sum()) / ranks.data.sum_no_grad(kept.sum()).clamp(min=1)


def _count(mask: Tensor) -> Tensor:
    """How many of the last dimension are true: ``mask.sum(-1, dtype=torch.float32)``.

    A CPU converts what it sums first, which takes several times as long as everything else here. So eight bytes are
    added at a time, as one number, and so few of them that no byte carries into the next.
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
    """Where a steered threshold starts: k features a token on average without hysteresis, and at least 0."""
    return batch_topk_threshold(pre, bias, k, segments, ranks).float().clamp(min=0.0)


class ThresholdController:
    """Steers one threshold so that the mean L0 meets a target.

    ``theta <- theta * exp(gain * clip(L0 / target - 1, -1, 1))`` after every step. What is frozen for inference
    is the exponential mean of log theta, which does not carry the last batch's noise.

    Args:
        target: wanted mean number of active features per token.
        gain: step size on log theta.
        decay: of the exponential mean.
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
        """One step of control; ``l0`` and the returned threshold are scalars. No device synchronisation."""
        error = (l0.float() / self.target - 1.0).clamp(-1.0, 1.0)
        self.theta = self.theta * torch.exp(self.gain * error)
        self.log_mean = self.decay * self.log_mean + (1.0 - self.decay) * self.theta.log()
        return self.theta

    @property
    def frozen(self) -> Tensor:
        """The threshold for inference, a scalar."""
        return self.log_mean.exp()

    def state_dict(self) -> dict[str, Tensor]:
        """Everything `load_state_dict` needs to go on."""
        return {"theta": self.theta, "log_mean": self.log_mean}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where `state_dict` was taken."""
        self.theta, self.log_mean = state["theta"], state["log_mean"]
