"""A training step on lists of active features, with one dense product: the path of a GPU.

The encoder's product is dense; everything after it reads and writes the active features alone
(`tsae_kernels.sparse_features`), and Adam reads the gradient rows of features that fired (`tsae_kernels.row_adam`). It
is the step of the dense path to rounding. Nothing waits for the device.

A token's list has a fixed capacity. If a token that counts has more active features, the gradient would lack some, so
that step changes no weight: the flag `SparseStep.overflow` turns the optimizer's update off on the device. L0, a
steered threshold and the statistics of features do not come from the lists, and change. `check`, called wherever the
host reads values anyway, reports the steps lost and fits the capacity.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tsae.config import OptimizerConfig, TrainConfig
from tsae.errors import UserError
from tsae.parallel.axis import Axis, Ranks
from tsae.sae.model import SparseAutoencoder
from tsae.sae.straight_through import GatedEntries, gate_gradient_of_lists
from tsae.training.feature_lists import FeatureLists
from tsae.training.optimization import adam_state
from tsae_kernels import CountedStats, TemporalStats, available_backends
from tsae_kernels.row_adam import RowGradient, row_adam_
from tsae_kernels.sparse_features import SparseFeatures, decode_sparse_features, encode_gated, encode_sparse
from tsae_kernels.sparse_weights import DeferredGradients, WeightGradients, weight_gradients

_MARGIN = 4.0  # times the mean number of active features, where the number per token varies
_NEAR = 1.5  # times as many with the features that are nearly on: 1.3 to 1.5 in trained dictionaries
_ROUND = 16  # capacities are multiples of this
_MEMORY = 0.9  # of a step, for the longest list that is remembered
_GROWTH = 4  # at most, from one check to the next: the first step's longest list can be half the dictionary


def dense_reason(cfg: TrainConfig, processes: int = 1) -> str | None:
    """Why a step cannot run on lists of active features, None if it can."""
    sae, kind = cfg.sae, cfg.sae.kind
    if not kind.k_sparse or kind.nonlinearity != "relu":
        return f"sae.activation {sae.activation!r} has no threshold that keeps few features active"
    if kind.learned:
        return f"sae.activation {sae.activation!r} needs gradients of features that are off, for its thresholds"
    if kind.recurrent:
        return f"sae.activation {sae.activation!r} has features that stay active along the sequence"
    if sae.layer_norm != "none":
        return f"sae.layer_norm {sae.layer_norm!r} needs all features of a token"
    if sae.hysteresis != "causal":
        return f"sae.hysteresis {sae.hysteresis!r} is not one pass along the sequence"
    if sae.input_scale != 1.0:
        return f"sae.input_scale is {sae.input_scale}"
    if cfg.target is not None or sae.d_out:
        return "a transcoder's encoder and decoder have other widths"
    if cfg.objective.own_terms:
        return f"the Python function {cfg.objective.own_terms[0]!r} in objective.temporal needs all features of a token"
    if processes > 1:
        return f"there are {processes} processes"
    return None


def uses_lists(cfg: TrainConfig, device: torch.device, processes: int = 1) -> bool:
    """Whether steps run on lists of active features: `sparse_step`, where `auto` wants a GPU with Triton."""
    if cfg.sparse_step == "auto":
        gpu = device.type == "cuda" and available_backends()["triton"] == "ok"
        return gpu and dense_reason(cfg, processes) is None
    return cfg.sparse_step == "on"


def check_steps(cfg: TrainConfig, device: torch.device, processes: int = 1) -> None:
    """Raise `UserError` if `sparse_step` or `cuda_graph` asks for what this run cannot have."""
    reason = dense_reason(cfg, processes)
    if cfg.sparse_step == "on" and reason is not None:
        raise UserError(f"sparse_step is 'on', but {reason}; use 'auto'.")
    if cfg.cuda_graph and (device.type != "cuda" or processes > 1):
        where = f"on {device}" if device.type != "cuda" else f"in {processes} processes"
        raise UserError(f"cuda_graph is on, and this run is {where}; it needs one process on a GPU.")


class DeadRows(NamedTuple):
    """The rows of dead features, for AuxK: leaves of autograd, so that their gradient is not one of all features.

    features: (n) int64, all different; used: (n) bool, which of them are dead
    W_enc: (n, d_in), rows of W_enc.T; b_enc: (n); W_dec: (n, d_in)
    """

    features: Tensor
    used: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor

    @classmethod
    def of(cls, sae: SparseAutoencoder, features: Tensor, used: Tensor) -> DeadRows:
        """Of the given features."""
        parts = (each.detach().index_select(0, features) for each in (sae.W_enc.T, sae.b_enc, sae.W_dec))
        return cls(features, used, *(part.requires_grad_() for part in parts))

    def add_gradients(self, sae: SparseAutoencoder, data: Axis) -> None:
        """Add the gradients of these rows, summed over the shards of the batch, to those of all features."""
        for parameter, part in ((sae.W_enc, self.W_enc), (sae.b_enc, self.b_enc), (sae.W_dec, self.W_dec)):
            if part.grad is None or parameter.grad is None:
                continue
            data.sum_in_place(part.grad)
            grad = parameter.grad.T if parameter is sae.W_enc else parameter.grad
            grad.index_add_(0, self.features, part.grad)


class SparseStep:
    """Forward pass, gradients and update of an autoencoder on lists of active features.

    In every step `begin`; `encode` and `decode` for each piece of the batch; after the backward passes `gather`, then
    `clip` and `update`.

    Args:
        cfg: without a `dense_reason`.
        sae: the autoencoder.
        ranks: a single process.
        autocast: whether products run in bfloat16, with a copy of the weights that the optimizer keeps up to date.
    """

    def __init__(self, cfg: TrainConfig, sae: SparseAutoencoder, ranks: Ranks, *, autocast: bool) -> None:
        self.cfg, self.sae, self.ranks, self.autocast = cfg, sae, ranks, autocast
        margin = _MARGIN
        if cfg.sae.kind.threshold == "token":  # in bfloat16, features that tie with the (k + 1)-th can be on too
            margin = 1.5 if autocast else 1.0
        if cfg.sae.uses_gate_gradient:
            margin *= _NEAR
        self.least = self.capacity = self._rounded(math.ceil(margin * cfg.sae.k))
        device = sae.W_dec.device
        self.overflow = torch.zeros((), dtype=torch.bool, device=device)  # of this step
        self.lost = torch.zeros((), dtype=torch.int64, device=device)  # steps since the last check
        self.most = torch.zeros((), device=device)  # longest list of the last steps, older ones counting as shorter
        self._half: dict[str, Tensor] = {}  # W_enc.T and W_dec in bfloat16
        self._stale: set[str] = set()  # those of them that are out of date
        self._deferred = DeferredGradients()
        self._rows: dict[str, RowGradient] = {}
        self._square = torch.zeros((), device=device)  # of the norm of both matrices' gradients
        self._share: Tensor | None = None
        self._clip: Tensor | None = None

    def _rounded(self, count: int) -> int:
        return min(self.cfg.sae.d_sae, -(-count // _ROUND) * _ROUND)

    def forget_copies(self) -> None:
        """To be called when anything else has changed the weights."""
        self._stale = set(self._half)

    def _by_feature(self, name: str) -> Tensor:
        """W_enc.T or W_dec, (d_sae, d_in)."""
        weight = getattr(self.sae, name).detach()
        return weight.T if name == "W_enc" else weight

    def _operand(self, name: str) -> Tensor:
        """The same in the dtype of products."""
        if not self.autocast:
            return self._by_feature(name)
        if name not in self._half:
            self._half[name] = self._by_feature(name).bfloat16()
        elif name in self._stale:
            self._half[name].copy_(self._by_feature(name))  # where it is, for a graph that reads it
        self._stale.discard(name)
        return self._half[name]

    def begin(self) -> None:
        """Start a step."""
        self._deferred = DeferredGradients()
        self.overflow.zero_()
        self.most.mul_(_MEMORY)

    @torch.no_grad()
    def pre_activation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's input (B, T, d_in) and ``input @ W_enc`` (B, T, d_sae); x: (B, T, d_in), normalized."""
        if self.cfg.sae.apply_b_dec_to_input:
            x = x - self.sae.b_dec
        W_enc = self._operand("W_enc")
        x = x.to(W_enc.dtype)
        return x, x @ W_enc.T

    def encode(
        self, x: Tensor, pre: Tensor, bands: tuple[tuple[int, int], ...], segments: Tensor
    ) -> tuple[FeatureLists, TemporalStats | CountedStats, Tensor]:
        """The active features, their statistics, and the mean L0 (a scalar, exact whatever the capacity).

        x, pre: from `pre_activation`
        """
        sae, bias = self.sae, self.sae.b_enc.detach()
        threshold, release = sae.thresholds(pre, bias, segments, self.capacity)
        W_enc = self._operand("W_enc").T
        shape = pre.shape[0], pre.shape[1], pre.shape[2]
        options: dict[str, Any] = {"capacity": self.capacity, "pre": pre, "deferred": self._deferred}
        options["transitions"] = sae.cfg.kind.rates
        if sae.cfg.uses_gate_gradient:
            assert threshold is not None
            assert release is not None
            levels = threshold, release
            near, stats = encode_gated(x, W_enc, bias, *levels, bands, segments, width=sae.cfg.bandwidth, **options)
            values = torch.where(near.values != 0, near.values, 0.0)  # only the decoder's gradient reaches the others
            gate, active = GatedEntries(near.values, near.levels), near.active
            lists = FeatureLists(values, near.indices, near.counts, shape, gate)
        else:
            features, stats = encode_sparse(x, W_enc, bias, threshold, release, bands, segments, **options)
            lists, active = FeatureLists(features.values, features.indices, features.counts, shape), features.counts
        kept = (segments >= 0).flatten()
        most = torch.where(kept, lists.counts, 0).max()
        self.overflow.logical_or_(most > self.capacity)
        self.most.copy_(torch.maximum(self.most, most))
        l0 = self.ranks.world.sum_no_grad(torch.where(kept, active, 0).sum(dtype=torch.float32))
        l0 = l0 / self.ranks.data.sum_no_grad(kept.sum()).clamp(min=1)
        return lists, stats, l0

    def decode(self, features: FeatureLists, price: Tensor | None = None) -> list[Tensor]:
        """Reconstructions (B, T, d_in) from the Matryoshka prefixes, the last of them the whole dictionary.

        price: for the gate's gradient, if the activation uses it, as in `SparseAutoencoder.gated`
        """
        values, cfg = features.values, self.cfg.sae
        if features.gate is not None:
            assert price is not None
            if price.dim():
                price = price[features.indices.clamp(max=cfg.d_sae - 1).long()]
            values = gate_gradient_of_lists(features.gate, cfg.bandwidth, cfg.gate_gradient, price)
        lists = SparseFeatures(values, features.indices, features.counts)
        ends = self.cfg.sae.groups if len(self.cfg.sae.groups) > 1 else (self.cfg.sae.d_sae,)
        parts = decode_sparse_features(lists, self._operand("W_dec"), ends=ends, deferred=self._deferred)
        return [part.view(*features.shape[:2], -1) + self.sae.b_dec for part in parts]

    @torch.no_grad()
    def gather(self, dead: DeadRows | None) -> None:
        """The gradients of W_enc, W_dec and b_enc after the backward passes, and what b_dec gets from the encoder."""
        sae = self.sae
        W_dec = sae.W_dec if self.cfg.sae.unit_norm_decoder else None
        gradients: WeightGradients = weight_gradients(self._deferred, W_dec)
        self._deferred = DeferredGradients()
        if self.cfg.sae.apply_b_dec_to_input:
            through_input = sae.W_enc @ gradients.bias
            sae.b_dec.grad = -through_input if sae.b_dec.grad is None else sae.b_dec.grad - through_input
        if dead is not None and dead.W_enc.grad is not None:
            assert dead.W_dec.grad is not None
            assert dead.b_enc.grad is not None
            gradients = gradients.add_rows(dead.features, dead.W_enc.grad, dead.W_dec.grad, dead.b_enc.grad, W_dec)
        sae.b_enc.grad = gradients.bias
        self._rows = {
            "W_enc": RowGradient(gradients.encoder, gradients.fired),
            "W_dec": RowGradient(gradients.decoder, gradients.fired),
        }
        self._share, decoder = None, gradients.decoder_square
        if W_dec is not None:  # without the components along the rows, whose length is share |w|
            self._share = gradients.along / gradients.weight_square.clamp(min=1e-24)
            decoder = (decoder - self._share * gradients.along).clamp(min=0.0)
        self._square = gradients.encoder_square.sum() + decoder.sum()

    @torch.no_grad()
    def clip(self, limit: float) -> Tensor:
        """The norm of all gradients, with the decoder's projected if its rows have norm 1; a scalar.

        Gradients of the biases are scaled to ``limit`` here, the rows of the matrices in `update`.
        """
        biases = [p.grad for p in (self.sae.b_enc, self.sae.b_dec) if p.grad is not None]
        norm = (self._square + sum(grad.square().sum() for grad in biases)).sqrt()
        self._clip = (limit / (norm + 1e-6)).clamp(max=1.0)
        for grad in biases:
            grad.mul_(self._clip)
        return norm

    @torch.no_grad()
    def update(self, optimizer: torch.optim.Optimizer, lr: float | Tensor, cfg: OptimizerConfig) -> None:
        """A step of Adam on everything, unless the lists overflowed."""
        optimizer.found_inf = self.overflow.float()  # type: ignore[attr-defined]  # GradScaler's way to skip a step
        optimizer.step()  # the biases, which alone have a `grad`
        optimizer.found_inf = None  # type: ignore[attr-defined]
        device = self.overflow.device
        rate = lr if isinstance(lr, Tensor) else torch.full((), lr, dtype=torch.float32, device=device)
        for name, rows in self._rows.items():
            decoder = name == "W_dec"
            if self.autocast:
                self._operand(name)
            row_adam_(
                self._by_feature(name),
                adam_state(optimizer, getattr(self.sae, name), transposed=not decoder),
                rows,
                lr=rate,
                betas=cfg.betas,
                weight_decay=cfg.weight_decay if cfg.name == "adamw" else 0.0,
                clip=self._clip,
                share=self._share if decoder else None,
                unit_norm=decoder and self.cfg.sae.unit_norm_decoder,
                shadow=self._half.get(name),
                skip=self.overflow,
            )
        self._rows = {}
        self.lost.add_(self.overflow)

    def check(self) -> int:
        """Steps lost to overflow since the last call, after which the capacity fits the lists of the last steps.

        The first steps have longer lists than any later ones, since their thresholds do not fit yet. So the capacity
        grows in steps, and shrinks once it is more than twice the wanted one. Waits for the device.
        """
        lost, wanted = int(self.lost), self._rounded(math.ceil(1.25 * float(self.most)))
        if lost:
            largest = self._rounded(_GROWTH * max(self.capacity, self.least))
            self.capacity = max(self.capacity, min(wanted, largest))
        elif self.capacity > 2 * wanted:
            self.capacity = max(self.least, wanted)
        self.lost.zero_()
        return lost

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the capacity, and the longest list of the last steps."""
        return {"list_capacity": self.capacity, "longest_list": float(self.most)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint, of dense steps too."""
        self.forget_copies()
        self.capacity = max(self.capacity, state.get("list_capacity", 0))
        self.most.fill_(state.get("longest_list", 0.0))
