"""The sparse autoencoder: parameters, encode, decode, and folding of the input normalization."""

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
from tsae.sae.hysteresis import exact_threshold, keep_two_sided
from tsae.sae.sparse_linear import decode_sparse, encode_linear, worthwhile
from tsae.sae.straight_through import straight_through, thresholds
from tsae.sae.thresholds import batch_topk_threshold, mean_l0, topk_threshold
from tsae_kernels import TemporalStats, activate_with_stats

NO_BANDS = ((1, 1),)  # the cheapest statistics, for callers that want the features alone
THRESHOLD_MOMENTUM = 0.05  # of batchtopk's running threshold
LEARNED = ("jumprelu", "jumprelu_schmitt")
SCHMITT = ("schmitt", "jumprelu_schmitt")
THRESHOLDED = ("batchtopk", "schmitt", *LEARNED)


class SparseAutoencoder(nn.Module):
    """A sparse autoencoder over sequences.

    ``h = activation((x - b_dec) / s W_enc + b_enc)`` and ``xhat = s (h W_dec) + b_dec``, with the input scale
    ``s`` 1 except where folding cannot absorb it (`folded`).

    Parameters: ``W_enc`` (d_in, d_sae), ``b_enc`` (d_sae), ``W_dec`` (d_sae, d_in), ``b_dec`` (d_in), float32.
    `jumprelu` and `jumprelu_schmitt` have ``log_threshold`` (d_sae) too, the second also ``release_logit`` (d_sae).
    Buffers: ``threshold`` and ``release`` (d_sae), in the units of the pre-activation: the switch-on and release
    thresholds of `schmitt` and `jumprelu_schmitt`, the threshold of `batchtopk` and `jumprelu`; 0 and unused
    otherwise.

    In ``train()`` mode a batchtopk autoencoder, and a schmitt one with exact steering, takes its threshold from the
    batch, and learned thresholds come from their parameters; in ``eval()`` mode all come from the buffers, which
    leaving ``train()`` brings up to date.

    Args:
        cfg: the architecture; ``cfg.d_in`` must be positive.
        generator: source of the initial weights.

    Raises:
        UserError: where ``cfg`` makes no sense.
    """

    def __init__(self, cfg: SAEConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        cfg.check()
        if cfg.d_in < 1:
            raise UserError(f"sae.d_in is {cfg.d_in}; a model needs the width of its input.")
        self.cfg = dataclasses.replace(cfg)
        self.ranks: Ranks = SINGLE_PROCESS
        shape = (cfg.d_sae, cfg.d_in)
        if cfg.init == "xavier":
            W_dec = nn.init.xavier_uniform_(torch.empty(shape), generator=generator)
            W_enc = nn.init.xavier_uniform_(torch.empty(shape), generator=generator).T
        else:
            W_dec = functional.normalize(torch.randn(shape, generator=generator), dim=1)
            W_enc = cfg.encoder_scale * W_dec.T
        if cfg.unit_norm_decoder:
            W_dec = functional.normalize(W_dec, dim=1)
        # [d_in, d_sae], a feature's weights side by side in memory: its gradient comes so (see sparse_linear).
        self.W_enc = nn.Parameter(W_enc.T.clone(memory_format=torch.contiguous_format).T)
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae))
        self.W_dec = nn.Parameter(W_dec)  # [d_sae, d_in]
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_in))
        self.threshold: Tensor
        self.release: Tensor
        self.register_buffer("threshold", torch.zeros(cfg.d_sae))
        self.register_buffer("release", torch.zeros(cfg.d_sae))
        self.log_threshold: nn.Parameter | None = None
        self.release_logit: nn.Parameter | None = None
        if cfg.activation in LEARNED:
            self.log_threshold = nn.Parameter(torch.zeros(cfg.d_sae))
        if cfg.activation == "jumprelu_schmitt":
            start = torch.full((cfg.d_sae,), cfg.release_ratio).logit(1e-3)
            self.release_logit = nn.Parameter(start)
        self.refresh_thresholds()

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters by the names that this class documents."""
        return dict(self.named_parameters())

    @property
    def thresholds_learned(self) -> bool:
        """Whether thresholds are parameters."""
        return self.log_threshold is not None

    @torch.no_grad()
    def refresh_thresholds(self) -> None:
        """Bring the buffers up to date with the learned thresholds, if there are any."""
        if self.log_threshold is not None:
            threshold, release = thresholds(self.log_threshold, self.release_logit)
            self.threshold.copy_(threshold)
            if release is not None:
                self.release.copy_(release)

    @torch.no_grad()
    def adopt_thresholds(self) -> None:
        """The reverse: set the parameters to what the buffers hold, which stay as they are."""
        if self.log_threshold is not None:
            self.log_threshold.copy_(self.threshold.clamp(min=1e-30).log())
        if self.release_logit is not None:
            self.release_logit.copy_((self.release / self.threshold.clamp(min=1e-30)).logit(1e-6))

    def train(self, mode: bool = True) -> SparseAutoencoder:
        """As in PyTorch; to leave training freezes learned thresholds into the buffers."""
        if self.training and not mode:
            self.refresh_thresholds()
        return super().train(mode)

    @property
    def _k_sparse(self) -> bool:
        """Whether few features are active, and those come out of a thresholded relu."""
        return self.cfg.activation not in ("relu", "gelu") and self.cfg.layer_norm != "post"

    def pre_activation(self, x: Tensor, features: Tensor | None = None) -> Tensor:
        """``(x - b_dec) / s W_enc``, without ``b_enc``.

        x: (..., d_in) floating point, in the units the autoencoder was made for: a saved one takes raw activations
        features: (n) int64, the columns that are wanted; None: all
        out: (..., d_sae) or (..., n), in the autocast dtype where autocast is on
        """
        if self.cfg.apply_b_dec_to_input:
            x = x - self.ranks.features.identity_sum_grad(self.b_dec)
        if self.cfg.input_scale != 1.0:
            x = x / self.cfg.input_scale
        if features is not None:
            return x @ self.W_enc.T.index_select(0, features).T
        if self._k_sparse and torch.is_grad_enabled() and worthwhile(x):
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
        segments: (B, T) integers or None; negative ids are excluded from statistics and batch thresholds
        backend: as in `tsae_kernels.temporal_stats`
        out: features (B, T, d_sae) in the dtype and unit of ``pre`` (layer normalization: without unit) and their
            `TemporalStats` over ``bands``

        Raises as `tsae_kernels.activate_with_stats`.
        """
        h, stats, _ = self._activate(pre, bands, segments, backend)
        return h, stats

    def activate_counted(
        self, pre: Tensor, bands: tuple[tuple[int, int], ...] = NO_BANDS, segments: Tensor | None = None
    ) -> tuple[Tensor, TemporalStats, Tensor]:
        """`activate`, and the mean number of active features, a scalar; its gradient reaches learned thresholds.

        pre, bands, segments: as in `activate`
        """
        h, stats, l0 = self._activate(pre, bands, segments, None)
        if l0 is None:
            return h, stats, mean_l0(h.detach(), segments, self.ranks)
        if self.ranks.world.size > 1:
            kept = torch.ones(h.shape[:2], device=h.device) if segments is None else (segments >= 0).float()
            own = kept.sum()
            l0 = self.ranks.world.sum_identity_grad(l0 * (own / self.ranks.data.sum_no_grad(own).clamp(min=1.0)))
        return h, stats, l0

    def _activate(
        self, pre: Tensor, bands: tuple[tuple[int, int], ...], segments: Tensor | None, backend: str | None
    ) -> tuple[Tensor, TemporalStats, Tensor | None]:
        cfg = self.cfg
        learning = self.log_threshold is not None and self.training
        if learning:
            self.refresh_thresholds()
        bias: Tensor | None = self.b_enc
        if cfg.layer_norm == "pre":
            pre, bias = functional.layer_norm(pre + self.b_enc, (cfg.d_sae,)), None
        threshold: Tensor | None = None
        release: Tensor | None = None
        if cfg.activation == "topk":
            threshold = topk_threshold(pre, bias, cfg.k, self.ranks.features)  # [B, T, 1]
        elif cfg.activation == "batchtopk" and self.training:
            threshold = batch_topk_threshold(pre, bias, cfg.k, segments, self.ranks)
            self._track(threshold)
        elif cfg.steering == "exact" and self.training:
            two_sided = cfg.hysteresis == "two-sided"
            threshold = exact_threshold(
                pre, bias, cfg.k, cfg.release_ratio, segments, two_sided=two_sided, ranks=self.ranks
            )
            release = threshold * cfg.release_ratio
            self._track(threshold)
        elif cfg.activation in THRESHOLDED:
            threshold = self.threshold
            release = self.release if cfg.activation in SCHMITT else None
        if cfg.hysteresis == "two-sided":
            assert threshold is not None
            assert release is not None
            pre = keep_two_sided(pre, bias, threshold, release, segments, backend=backend)
            threshold, release = None, None
        kind = "gelu" if cfg.activation == "gelu" else "relu"
        if cfg.layer_norm == "post":
            h, _ = activate_with_stats(pre, bias, kind, threshold, release, NO_BANDS, segments, backend=backend)
            h = functional.layer_norm(h, (cfg.d_sae,))
            return *activate_with_stats(h, None, "identity", None, None, bands, segments, backend=backend), None
        h, stats = activate_with_stats(pre, bias, kind, threshold, release, bands, segments, backend=backend)
        if not learning or not torch.is_grad_enabled():
            return h, stats, None
        assert self.log_threshold is not None
        h, l0 = straight_through(h, pre, bias, self.log_threshold, self.release_logit, cfg.bandwidth, segments)
        return h, stats, l0

    @torch.no_grad()
    def _track(self, threshold: Tensor) -> None:
        """Running mean of the batch's threshold, for inference, as BatchNorm keeps its mean."""
        threshold = threshold.float().clamp(min=0.0)
        moved = torch.lerp(self.threshold, threshold.expand_as(self.threshold), THRESHOLD_MOMENTUM)
        self.threshold.copy_(torch.where(self.threshold == 0, threshold, moved))
        if self.cfg.activation == "schmitt":
            self.release.copy_(self.threshold * self.cfg.release_ratio)

    def encode(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """Features of activations; the last dimension but one is the sequence (hysteresis runs along it).

        x: (..., T, d_in) floating point, or (d_in) for one token; in the units the autoencoder was made for
        segments: (..., T) integers or None: hysteresis starts off at every new id; negative ids are excluded
        out: (..., T, d_sae), in the units of ``x``; in those of the training's normalized input for gelu, and without
            unit for layer normalization

        Raises:
            UserError: the last dimension is not ``cfg.d_in``.
        """
        if x.shape[-1] != self.cfg.d_in:
            raise UserError(f"The input's last dimension is {x.shape[-1]}; this autoencoder takes {self.cfg.d_in}.")
        lead = x.shape[:-1]
        tokens = lead[-1] if lead else 1
        pre = self.pre_activation(x).reshape(-1, tokens, self.cfg.d_sae)
        h, _ = self.activate(pre, segments=None if segments is None else segments.reshape(-1, tokens))
        return h.reshape(*lead, self.cfg.d_sae)

    def decode(self, h: Tensor) -> Tensor:
        """Reconstruction from features.

        h: (..., d_sae), as `encode` gives them
        out: (..., d_in), in the units of the input
        """
        return self._shifted(self._summed(self._product(h, self.W_dec)))

    def decode_prefixes(self, h: Tensor) -> list[Tensor]:
        """Reconstructions from the first ``cfg.groups[0]``, ``cfg.groups[1]``, ... features; the last is `decode`'s.

        Every group of features is decoded once, and the sums run on: together they cost what one `decode` does. Without
        groups the list is ``[decode(h)]``.

        h: (..., d_sae)
        out: of (..., d_in)
        """
        if len(self.cfg.groups) < 2:
            return [self.decode(h)]
        first = self.ranks.features.rank * h.shape[-1]  # of the features that are here
        ends = [min(max(end - first, 0), h.shape[-1]) for end in self.cfg.groups]
        sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        out: list[Tensor] = []
        for features, W_dec in zip(h.split(sizes, -1), self.W_dec.split(sizes), strict=True):
            part = self._product(features, W_dec)
            out.append(part if not out else out[-1] + part)
        if self.ranks.features.size > 1:
            out = list(self._summed(torch.stack([product.float() for product in out])))
        return [self._shifted(product) for product in out]

    def _summed(self, product: Tensor) -> Tensor:
        """Over the parts of the dictionary, in float32."""
        return product if self.ranks.features.size == 1 else self.ranks.features.sum_identity_grad(product.float())

    def _product(self, h: Tensor, W_dec: Tensor) -> Tensor:
        # A learned threshold needs the gradient of features that are 0, which the sparse product leaves out.
        whole = self.thresholds_learned and self.training and torch.is_grad_enabled()
        sparse = self._k_sparse and not whole and len(W_dec) > 0 and worthwhile(h)
        return decode_sparse(h, W_dec) if sparse else h @ W_dec

    def _shifted(self, product: Tensor) -> Tensor:
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
    def folded(self, mean: Tensor, scale: float) -> SparseAutoencoder:
        """This autoencoder, trained on ``(x - mean) / scale``, as one that works on raw ``x``.

        The mean goes into ``b_dec``, subtracted from the input first, which keeps float32 exact enough where
        the mean is thousands of times the spread. The scale goes into the biases and thresholds where the
        nonlinearity is homogeneous, so that features come out in the activations' units; for gelu and layer
        normalization it stays in ``cfg.input_scale``.

        mean: (d_in), float
        scale: positive, in the units of ``x``
        out: a copy, on the same device and in the same mode
        """
        mean = mean.to(self.b_dec)
        cfg = dataclasses.replace(self.cfg, apply_b_dec_to_input=True)
        homogeneous = cfg.activation != "gelu" and cfg.layer_norm == "none"
        b_enc = self.b_enc.clone()
        if not self.cfg.apply_b_dec_to_input:
            b_enc += self.b_dec @ self.W_enc
        if not homogeneous:
            cfg.input_scale = self.cfg.input_scale * scale
        if self.training:
            self.refresh_thresholds()
        out = SparseAutoencoder(cfg).to(self.b_dec.device).train(self.training)
        gain = scale if homogeneous else 1.0
        out.W_enc.copy_(self.W_enc)
        out.W_dec.copy_(self.W_dec)
        out.b_enc.copy_(b_enc * gain)
        out.b_dec.copy_(self.b_dec * scale + mean)
        out.threshold.copy_(self.threshold * gain)
        out.release.copy_(self.release * gain)
        out.adopt_thresholds()
        return out

    def save(self, directory: str | Path, **metadata: object) -> None:
        """Write SAELens's directory format: `cfg.json` and `sae_weights.safetensors`, each file atomically.

        directory: made if it is not there
        metadata: values that JSON can hold, for `cfg.json`'s `metadata`: SAELens reads `model_name`, `hook_name`,
            `context_size`, `prepend_bos`, `dataset_path`
        """
        from tsae.sae.saving import save

        save(self, Path(directory), metadata)

    @classmethod
    def load(cls, directory: str | Path, device: str | torch.device = "cpu") -> SparseAutoencoder:
        """Read a directory written by `save` or by SAELens (standard, topk, jumprelu), in ``eval()`` mode, float32.

        directory: a run's `sae/`
        device: where its parameters go

        Raises:
            UserError: a file is missing or broken, the architecture is not known, or a tensor has the wrong shape.
        """
        from tsae.sae.saving import load

        return load(Path(directory), device)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload it with a generated model card; safetensors and JSON, never a pickle.

        repo_id: "name" or "owner/name" on the Hugging Face hub
        options: those of `tsae.hub.push`; ``run`` names the run directory that it comes from
        out: the address of the commit
        """
        from tsae.hub import push

        return push(self, repo_id, **options)

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> SparseAutoencoder:
        """An autoencoder of the Hugging Face hub or of a local directory, in ``eval()`` mode; never from a pickle.

        name: `OWNER/NAME[/FOLDER...][@REVISION]`, the directory of an autoencoder, or that of a run
        options: those of `tsae.hub.load`
        out: the autoencoder, which works on raw activations
        """
        from tsae.hub import load

        return load(name, **options)
