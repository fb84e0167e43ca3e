"""The sparse autoencoder: parameters, encode, decode, and folding of the input normalization into the weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tsae.config import SAEConfig
from tsae.errors import UserError
from tsae.parallel.axis import SINGLE_PROCESS, Ranks
from tsae.sae import saving
from tsae.sae.hysteresis import exact_threshold, mask_path, mask_two_sided
from tsae.sae.rates import path_costs
from tsae.sae.recurrence import decay_of, logit_of
from tsae.sae.sparse_linear import decode_sparse, encode_linear, use_sparse_products
from tsae.sae.straight_through import GateLevels, gate_gradient, learned_thresholds, straight_through
from tsae.sae.thresholds import batch_topk_threshold, mean_l0, topk_threshold
from tsae.utils.paths import expanded
from tsae_kernels import CountedStats, TemporalStats, activate_with_stats, leaky_recurrence

NO_BANDS = ((1, 1),)  # the cheapest statistics, for callers that need only the features
THRESHOLD_EMA_WEIGHT = 0.05  # of the latest batch, in the running threshold


class SparseAutoencoder(nn.Module):
    """A sparse autoencoder over sequences.

    ``h = activation((x - b_dec) / s W_enc + b_enc)`` and ``xhat = s (h W_dec) + b_dec``. The input scale ``s`` is 1
    unless `folded` cannot absorb it into the weights. With ``cfg.d_out`` it is a transcoder: ``xhat``, of that width,
    predicts other activations than ``x``, and ``b_dec`` is not subtracted from the input.

    Parameters, float32: ``W_enc`` (d_in, d_sae), ``b_enc`` (d_sae), ``W_dec`` (d_sae, d_out), ``b_dec`` (d_out), where
    d_out is d_in for an autoencoder;
    for learned thresholds also ``log_threshold`` (d_sae), and with a release ``release_logit`` (d_sae); for the
    recurrence of persistent ``decay_logit`` (d_sae).
    Buffers: ``threshold`` and ``release`` (d_sae), in the units of the pre-activation; 0 and unused by activations
    that store none (`tsae.sae.kinds`). `rate` also keeps ``rates`` (2, d_sae), P(on | off before) and P(on | on
    before), and ``bit_price`` (scalar), what a bit costs in the square of the pre-activation's units. With a recurrence
    also ``decay`` (d_sae).

    In ``train()`` mode a batchtopk autoencoder, and a schmitt one with exact steering, computes its threshold from the
    batch, and learned thresholds come from their parameters. In ``eval()`` mode all thresholds come from the buffers,
    which are updated on leaving ``train()``.

    ``metadata`` is what a file says of the activations and the model it was trained on, under SAELens's names
    (`tsae.sae.metadata`); `save` writes it again.

    Args:
        cfg: the architecture; ``cfg.d_in`` must be positive.
        generator: source of the initial weights.

    Raises:
        UserError: ``cfg`` is invalid.
    """

    def __init__(self, cfg: SAEConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        cfg.check()
        if cfg.d_in < 1:
            raise UserError(f"sae.d_in is {cfg.d_in}; set it to the width of the activations.")
        self.cfg = dataclasses.replace(cfg)
        self.ranks: Ranks = SINGLE_PROCESS
        self.metadata: dict[str, Any] = {}
        W_enc, W_dec = _initial_weights(cfg, generator)
        # [d_in, d_sae], but stored feature by feature: its gradient comes in that layout (see sparse_linear).
        self.W_enc = nn.Parameter(W_enc.T.clone(memory_format=torch.contiguous_format).T)
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae))
        self.W_dec = nn.Parameter(W_dec)  # [d_sae, d_out]
        self.b_dec = nn.Parameter(torch.zeros(cfg.width_out))
        self.threshold: Tensor
        self.release: Tensor
        self.decay: Tensor
        self.register_buffer("threshold", torch.zeros(cfg.d_sae))
        self.register_buffer("release", torch.zeros(cfg.d_sae))
        if cfg.kind.rates:
            self.rates: Tensor
            self.bit_price: Tensor
            self.register_buffer("rates", torch.full((2, cfg.d_sae), 0.5))
            self.register_buffer("bit_price", torch.zeros(()))
        self.log_threshold: nn.Parameter | None = None
        self.release_logit: nn.Parameter | None = None
        if cfg.kind.learned:
            self.log_threshold = nn.Parameter(torch.zeros(cfg.d_sae))
            if cfg.kind.release:
                self.release_logit = nn.Parameter(torch.full((cfg.d_sae,), cfg.release_ratio).logit(1e-3))
        self.decay_logit: nn.Parameter | None = None
        if cfg.kind.recurrent:
            self.decay_logit = nn.Parameter(logit_of(torch.full((cfg.d_sae,), cfg.initial_decay)))
            self.register_buffer("decay", torch.full((cfg.d_sae,), cfg.initial_decay))
        self.update_threshold_buffers()

    def extra_repr(self) -> str:
        """What `repr` shows."""
        out = f", d_out={self.cfg.d_out}" if self.cfg.d_out else ""
        return f"d_in={self.cfg.d_in}, d_sae={self.cfg.d_sae}{out}, activation={self.cfg.activation}"

    def parameter_dict(self) -> dict[str, nn.Parameter]:
        """The parameters, under the names that this class documents."""
        return dict(self.named_parameters())

    def not_finite(self) -> str | None:
        """A clause naming the first tensor with NaN or infinity; None if there is none. Thresholds may be +inf."""
        for name, tensor in self.state_dict().items():
            if name in ("log_threshold", "release_logit", "decay_logit"):
                continue
            bad = int((~(tensor.isfinite() | ((tensor == torch.inf) & (name == "threshold")))).sum())
            if bad:
                return f"{name} has {bad} values that are not finite"
        return None

    @property
    def thresholds_learned(self) -> bool:
        """Whether thresholds are parameters."""
        return self.log_threshold is not None

    @torch.no_grad()
    def update_threshold_buffers(self) -> None:
        """Copy learned thresholds and decays, if any, from the parameters to the buffers."""
        if self.decay_logit is not None:
            self.decay.copy_(decay_of(self.decay_logit))
        if self.log_threshold is not None:
            threshold, release = learned_thresholds(self.log_threshold, self.release_logit)
            self.threshold.copy_(threshold)
            if release is not None:
                self.release.copy_(release)

    @torch.no_grad()
    def update_threshold_parameters(self) -> None:
        """Set the parameters of learned thresholds and decays, if any, to the values in the buffers."""
        if self.decay_logit is not None:
            self.decay_logit.copy_(logit_of(self.decay))
        if self.log_threshold is not None:
            self.log_threshold.copy_(self.threshold.clamp(min=1e-30).log())
        if self.release_logit is not None:
            self.release_logit.copy_((self.release / self.threshold.clamp(min=1e-30)).logit(1e-6))

    def train(self, mode: bool = True) -> SparseAutoencoder:
        """As in PyTorch; leaving training mode also copies learned thresholds to the buffers."""
        if self.training and not mode:
            self.update_threshold_buffers()
        return super().train(mode)

    @property
    def _sparse_features(self) -> bool:
        """Whether few features are active, all from a thresholded ReLU."""
        return self.cfg.kind.k_sparse and self.cfg.layer_norm != "post"

    def pre_activation(self, x: Tensor, features: Tensor | None = None) -> Tensor:
        """``(x - b_dec) / s W_enc``, without ``b_enc``.

        x: (..., d_in) floating point, in the units of training (raw activations for a saved autoencoder); converted to
            the dtype of the parameters
        features: (n) int64, the features to compute; None: all
        out: (..., d_sae) or (..., n), in the dtype of the parameters, or of autocast if it is on
        """
        x = x.to(self.W_enc.dtype)
        if self.cfg.apply_b_dec_to_input:
            x = x - self.ranks.features.identity_sum_grad(self.b_dec)
        if self.cfg.input_scale != 1.0:
            x = x / self.cfg.input_scale
        if features is not None:
            return x @ self.W_enc.T.index_select(0, features).T
        if self._sparse_features and torch.is_grad_enabled() and use_sparse_products(x):
            return encode_linear(x, self.W_enc)
        return x @ self.W_enc

    def activate(
        self,
        pre: Tensor,
        bands: tuple[tuple[int, int], ...] = NO_BANDS,
        segments: Tensor | None = None,
        *,
        backend: str | None = None,
    ) -> tuple[Tensor, TemporalStats]:
        """Bias, nonlinearity and temporal statistics in one pass.

        pre: (B, T, d_sae), from `pre_activation`
        bands: ranges of token offsets, as in `tsae_kernels.temporal_stats`
        segments: (B, T) integers or None; positions with negative ids do not count in statistics and batch thresholds
        backend: as in `tsae_kernels.temporal_stats`
        out: features (B, T, d_sae) in the dtype and units of ``pre`` (unitless with layer normalization), and their
            `TemporalStats` over ``bands``

        Raises as `tsae_kernels.activate_with_stats`.
        """
        h, stats, _ = self._activate(pre, bands, segments, backend)
        return h, stats.temporal if isinstance(stats, CountedStats) else stats

    def activate_counted(
        self, pre: Tensor, bands: tuple[tuple[int, int], ...] = NO_BANDS, segments: Tensor | None = None
    ) -> tuple[Tensor, TemporalStats | CountedStats, Tensor]:
        """`activate`, and the mean L0 as a scalar, whose gradient reaches learned thresholds.

        In training with rates the statistics are `CountedStats`.

        pre, bands, segments: as in `activate`
        """
        h, stats, l0 = self._activate(pre, bands, segments, None)
        if l0 is None:
            return h, stats, mean_l0(h.detach(), segments, self.ranks)
        kept = torch.ones(h.shape[:2], device=h.device) if segments is None else (segments >= 0).float()
        share = kept.sum() / self.ranks.data.sum_no_grad(kept.sum()).clamp(min=1.0)
        return h, stats, self.ranks.world.sum_identity_grad(l0 * share)

    def _activate(
        self, pre: Tensor, bands: tuple[tuple[int, int], ...], segments: Tensor | None, backend: str | None
    ) -> tuple[Tensor, TemporalStats | CountedStats, Tensor | None]:
        """Features, statistics, and the mean L0 if thresholds are being learned (else None)."""
        cfg, kind = self.cfg, self.cfg.kind
        bias: Tensor | None = self.b_enc
        if cfg.layer_norm == "pre":
            pre, bias = functional.layer_norm(pre + self.b_enc, (cfg.d_sae,)), None
        threshold, release = self.thresholds(pre, bias, segments)
        if cfg.hysteresis == "two-sided":
            assert threshold is not None
            assert release is not None
            pre = mask_two_sided(pre, bias, threshold, release, segments, backend=backend)
            threshold, release = None, None
        elif cfg.hysteresis == "path":
            transition, start = path_costs(self.rates, cfg.amplitude_bits)
            price = self.bit_price
            pre = mask_path(pre, bias, price * transition, price * start, segments, backend=backend)
            threshold, release = None, None
        arguments = (pre, bias, kind.nonlinearity, threshold, release)
        if cfg.layer_norm == "post":
            h, _ = activate_with_stats(*arguments, NO_BANDS, segments, backend=backend)
            h = functional.layer_norm(h, (cfg.d_sae,))
            return *activate_with_stats(h, None, "identity", None, None, bands, segments, backend=backend), None
        if self.decay_logit is not None:
            a, _ = activate_with_stats(*arguments, NO_BANDS, segments, backend=backend)
            decay = decay_of(self.decay_logit) if self.training else self.decay
            h = leaky_recurrence(a, decay, segments, backend=backend)
            return *activate_with_stats(h, None, "identity", None, None, bands, segments, backend=backend), None
        counted = kind.rates and self.training
        h, stats = activate_with_stats(*arguments, bands, segments, transitions=counted, backend=backend)
        if self.log_threshold is None or not self.training or not torch.is_grad_enabled():
            return h, stats, None
        h, l0 = straight_through(h, pre, bias, self.log_threshold, self.release_logit, cfg.bandwidth, segments)
        return h, stats, l0

    def thresholds(
        self, pre: Tensor, bias: Tensor | None, segments: Tensor | None, candidates: int | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Threshold and release of a forward pass, None where there is none; in training from batch or parameters.

        pre: (B, T, d_sae); bias: (d_sae) or None; segments: (B, T) or None
        candidates: for thresholds of the batch on a GPU, see `tsae.sae.thresholds.threshold_without_waiting`
        """
        cfg, kind = self.cfg, self.cfg.kind
        if kind.threshold == "none":
            return None, None
        if kind.threshold == "token":
            return topk_threshold(pre, bias, cfg.k, self.ranks.features), None  # [B, T, 1]
        if self.training and kind.threshold == "batch":
            threshold = batch_topk_threshold(pre, bias, cfg.k, segments, self.ranks, candidates)
        elif self.training and cfg.steering == "exact":
            two_sided, arguments = cfg.hysteresis == "two-sided", (pre, bias, cfg.k, cfg.release_ratio, segments)
            threshold = exact_threshold(*arguments, two_sided=two_sided, ranks=self.ranks, candidates=candidates)
        else:
            if self.training:
                self.update_threshold_buffers()
            return self.threshold, self.release if kind.release else None
        self._track(threshold)
        return threshold, threshold * cfg.release_ratio if kind.release else None

    @torch.no_grad()
    def _track(self, threshold: Tensor) -> None:
        """Update the running mean of batch thresholds, which inference uses as BatchNorm uses its running mean."""
        threshold = threshold.float().clamp(min=0.0)
        moved = torch.lerp(self.threshold, threshold.expand_as(self.threshold), THRESHOLD_EMA_WEIGHT)
        self.threshold.copy_(torch.where(self.threshold == 0, threshold, moved))
        if self.cfg.kind.release:
            self.release.copy_(self.threshold * self.cfg.release_ratio)

    def encode(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """Features of activations. The second-to-last dimension is the sequence, along which hysteresis runs.

        x: (..., T, d_in) floating point, or (d_in) for one token; units as in `pre_activation`. Any dimension but the
            last may be 0.
        segments: (..., T) integers or None; hysteresis is reset at every new id, and negative ids are excluded
        out: (..., T, d_sae), in the dtype of the parameters and the units of ``x``; for gelu in those of the normalized
            input of training; unitless with layer normalization

        Raises:
            UserError: the last dimension is not ``cfg.d_in``.
        """
        if x.shape[-1] != self.cfg.d_in:
            raise UserError(f"The input's last dimension is {x.shape[-1]}; this autoencoder takes {self.cfg.d_in}.")
        lead = x.shape[:-1]
        tokens = lead[-1] if lead else 1
        pre = self.pre_activation(x)
        if pre.numel() == 0:
            return pre  # no token, so no feature; the kernels take sequences of at least one
        pre = pre.reshape(-1, tokens, self.cfg.d_sae)
        h, _ = self.activate(pre, segments=None if segments is None else segments.reshape(-1, tokens))
        return h.reshape(*lead, self.cfg.d_sae)

    def gated(self, h: Tensor, pre: Tensor, segments: Tensor, price: float | Tensor) -> Tensor:
        """``h`` for `decode_prefixes` in training, with the pseudo-gradient of being on (``cfg.gate_gradient``).

        h: (B, T, d_sae), from `activate_counted` of ``pre``; pre, segments: as there
        price: what a unit of squared error of one position weighs in the loss; a scalar or (d_sae)
        """
        levels = GateLevels(self.b_enc, self.threshold, self.release)
        return gate_gradient(h, pre, levels, segments, self.cfg.bandwidth, self.cfg.gate_gradient, price)

    def decode(self, h: Tensor) -> Tensor:
        """Reconstruction from features.

        h: (..., d_sae), from `encode`; any floating-point dtype
        out: (..., d_in), for a transcoder (..., d_out), in the units of the activations and the dtype of the parameters
        """
        return self._rescale(self._sum_over_shards(self._decode_product(h, self.W_dec)))

    def decode_prefixes(self, h: Tensor) -> list[Tensor]:
        """Reconstructions from the first ``cfg.groups[0]``, ``cfg.groups[1]``, ... features (Matryoshka).

        The groups are decoded once each and summed cumulatively, so all of them together cost one `decode`.

        h: (..., d_sae)
        out: a list of (..., d_in); the last is ``decode(h)``, and without groups the only one
        """
        if len(self.cfg.groups) < 2:
            return [self.decode(h)]
        first = self.ranks.features.rank * h.shape[-1]  # index of this shard's first feature
        ends = [min(max(end - first, 0), h.shape[-1]) for end in self.cfg.groups]
        sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        out: list[Tensor] = []
        for features, W_dec in zip(h.split(sizes, -1), self.W_dec.split(sizes), strict=True):
            part = self._decode_product(features, W_dec)
            out.append(part if not out else out[-1] + part)
        return [self._rescale(self._sum_over_shards(product)) for product in out]

    def _sum_over_shards(self, product: Tensor) -> Tensor:
        """The sum over the shards of the dictionary, in float32."""
        return self.ranks.features.sum_identity_grad(product, torch.float32)

    def _decode_product(self, h: Tensor, W_dec: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(h.device.type):  # which converts by itself
            h = h.to(W_dec.dtype)
        # Learned thresholds need the gradient of features that are 0, which the sparse product skips.
        full_gradient = self.thresholds_learned and self.training and torch.is_grad_enabled()
        dense = full_gradient or self.cfg.kind.recurrent  # whose features stay above 0 once they were
        sparse = self._sparse_features and not dense and len(W_dec) > 0 and use_sparse_products(h)
        return decode_sparse(h, W_dec) if sparse else h @ W_dec

    def _rescale(self, product: Tensor) -> Tensor:
        if self.cfg.input_scale != 1.0:
            product = product * self.cfg.input_scale
        return product + self.b_dec

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """``decode(encode(x))``.

        x, segments: as in `encode`
        out: (..., d_in), in the units of ``x``
        """
        return self.decode(self.encode(x, segments))

    @torch.no_grad()
    def folded(
        self, mean: Tensor, scale: float, target_mean: Tensor | None = None, target_scale: float = 1.0
    ) -> SparseAutoencoder:
        """A copy that takes raw ``x``, of an autoencoder trained on ``(x - mean) / scale``.

        The mean goes into ``b_dec``, which is subtracted from the input first: float32 stays accurate even if the
        mean is thousands of times the spread. For a homogeneous nonlinearity the scale goes into the biases and
        thresholds, so features have the units of the activations. For gelu and layer normalization it becomes
        ``cfg.input_scale``.

        A transcoder's features have the units of its target, so that its decoder rows stay as they are: the encoder is
        multiplied by ``target_scale / scale``, and ``mean`` goes through it, in float64, into ``b_enc``.

        mean: (d_in), float
        scale: positive, in the units of ``x``
        target_mean, target_scale: (d_out) and positive, of a transcoder's target
        out: on the same device and in the same mode
        """
        if target_mean is not None:
            return self._folded_transcoder(mean, scale, target_mean, target_scale)
        mean = mean.to(self.b_dec)
        cfg = dataclasses.replace(self.cfg, apply_b_dec_to_input=True)
        homogeneous = cfg.kind.homogeneous and cfg.layer_norm == "none"
        b_enc = self.b_enc.clone()
        if not self.cfg.apply_b_dec_to_input:
            b_enc += self.b_dec @ self.W_enc
        if not homogeneous:
            cfg.input_scale = self.cfg.input_scale * scale
        if self.training:
            self.update_threshold_buffers()
        out = SparseAutoencoder(cfg).to(self.b_dec.device).train(self.training)
        gain = scale if homogeneous else 1.0
        out.W_enc.copy_(self.W_enc)
        out.W_dec.copy_(self.W_dec)
        out.b_enc.copy_(b_enc * gain)
        out.b_dec.copy_(self.b_dec * scale + mean)
        self._copy_levels(out, gain)
        out.metadata = dict(self.metadata)
        return out

    def _copy_levels(self, out: SparseAutoencoder, gain: float) -> None:
        """Give ``out`` what decides its features, for features multiplied by ``gain``."""
        out.threshold.copy_(self.threshold * gain)
        out.release.copy_(self.release * gain)
        if self.cfg.kind.rates:
            out.rates.copy_(self.rates)
            out.bit_price.copy_(self.bit_price * gain**2)
        if self.decay_logit is not None:
            out.decay.copy_(self.decay)
        out.update_threshold_parameters()

    def _folded_transcoder(
        self, mean: Tensor, scale: float, target_mean: Tensor, target_scale: float
    ) -> SparseAutoencoder:
        if self.training:
            self.update_threshold_buffers()
        cfg = dataclasses.replace(self.cfg)
        homogeneous = cfg.kind.homogeneous and cfg.layer_norm == "none"
        gain = target_scale if homogeneous else 1.0  # of the features
        if not homogeneous:
            cfg.input_scale = self.cfg.input_scale * scale
        out = SparseAutoencoder(cfg).to(self.b_dec.device).train(self.training)
        W_enc = self.W_enc.double()
        b_enc = self.b_enc.double() - mean.double() / (self.cfg.input_scale * scale) @ W_enc
        out.W_enc.copy_(W_enc * (gain / scale) if homogeneous else W_enc)
        out.b_enc.copy_(b_enc * gain)
        out.W_dec.copy_(self.W_dec if homogeneous else self.W_dec * (target_scale / scale))
        out.b_dec.copy_(self.b_dec * target_scale + target_mean)
        self._copy_levels(out, gain)
        out.metadata = dict(self.metadata)
        return out

    def save(self, directory: str | Path, **metadata: object) -> None:
        """Write SAELens's directory format: `cfg.json` and `sae_weights.safetensors`, each file atomically.

        directory: created if it does not exist
        metadata: JSON values for `cfg.json`'s `metadata`, added to ``self.metadata``; SAELens reads `model_name`,
            `hook_name`, `context_size`, `prepend_bos`, `dataset_path`
        """
        if self.training:
            self.update_threshold_buffers()
        unknown = {"hook_name": None} if "hook_layer" in self.metadata else {}  # `saving.load` then adds no place
        saving.save(expanded(directory), self.cfg, self.state_dict(), unknown | self.metadata | metadata)

    @classmethod
    def load(cls, directory: str | Path, device: str | torch.device = "cpu") -> SparseAutoencoder:
        """Read a directory written by `save`, in ``eval()`` mode, float32. `tsae.load` reads other libraries' formats.

        directory: a run's `sae/`
        device: where the parameters go

        Raises:
            UserError: a file is missing, damaged or was written by SAELens, or a tensor has the wrong shape.
        """
        cfg, tensors, metadata = saving.load(expanded(directory))
        sae = cls(cfg).eval()
        sae.metadata = metadata
        sae.load_state_dict(tensors, strict=False)  # without the parameters of learned thresholds
        sae.update_threshold_parameters()
        return sae.to(device)


def _initial_weights(cfg: SAEConfig, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """W_enc (d_in, d_sae) and W_dec (d_sae, d_out)."""
    shape = (cfg.d_sae, cfg.d_in)
    if cfg.init == "xavier":
        W_dec = nn.init.xavier_uniform_(torch.empty(cfg.d_sae, cfg.width_out), generator=generator)
        W_enc = nn.init.xavier_uniform_(torch.empty(shape), generator=generator).T
    else:
        W_dec = functional.normalize(torch.randn(cfg.d_sae, cfg.width_out, generator=generator), dim=1)
        rows = W_dec  # of a transcoder independent: its input and its target are two spaces
        if cfg.d_out:
            rows = functional.normalize(torch.randn(shape, generator=generator), dim=1)
        W_enc = cfg.encoder_scale * rows.T
    return W_enc, functional.normalize(W_dec, dim=1) if cfg.unit_norm_decoder else W_dec
