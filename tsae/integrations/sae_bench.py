"""Our autoencoders as custom SAEs of SAEBench, for all of its evaluations.

    sae = SAEBenchSAE(tsae.load("runs/latest"), model_name="pythia-70m-deduped", hook_layer=4)
    sae_bench.evals.core.main.multiple_evals([("my-sae", sae)], ...)

Needs sae-bench (docs/formats.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsae.errors import UserError
from tsae.sae.metadata import site_of
from tsae.sae.model import SparseAutoencoder

try:
    from sae_bench.custom_saes.base_sae import BaseSAE
except ImportError as error:
    raise UserError(
        f"tsae.integrations.sae_bench cannot import sae-bench ({error}); install it as docs/formats.md says."
    ) from None


class SAEBenchSAE(BaseSAE):
    """A `SparseAutoencoder` behind SAEBench's interface.

    Activations are (L, d_in), one sequence, or (B, L, d_in), in any dtype; features have the same dtype. In SAEBench
    the first position of a sequence is BOS, which the autoencoder never saw in training, so hysteresis is reset after
    it.

    SAEBench requires decoder rows of norm 1. Other norms are moved into the encoder, biases and thresholds, which
    rescales features and changes nothing else. An autoencoder whose features cannot be rescaled (topk, gelu, layer
    normalization) must have norm 1 already.

    Args:
        sae: the autoencoder, which is copied.
        model_name: TransformerLens's name of the language model.
        hook_layer: block whose output it encodes, counted from 0.
        device, dtype: of the weights.
        hook_name: default what ``sae.metadata`` says, or else `blocks.{hook_layer}.hook_resid_post`.

    Raises:
        UserError: ``sae.metadata`` says another layer than ``hook_layer``, or decoder rows do not have norm 1 and
            cannot be rescaled.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        model_name: str,
        hook_layer: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        hook_name: str | None = None,
    ) -> None:
        cfg, site = sae.cfg, site_of(sae.metadata)
        if cfg.d_out:
            raise UserError("SAEBench measures autoencoders, and this is a transcoder; use python -m tsae.evaluate.")
        if hook_name is None and site is not None:
            if site.layer != hook_layer and site.block != hook_layer:
                raise UserError(f"The autoencoder encodes {site.name}, but hook_layer is {hook_layer}; correct it.")
            hook_name = site.hook_name
        super().__init__(cfg.d_in, cfg.d_sae, model_name, hook_layer, torch.device("cpu"), torch.float32, hook_name)
        inner = _unit_norm(sae)
        self.inner = inner
        # The same tensors under both names; `to` keeps them shared.
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = inner.W_enc, inner.b_enc, inner.W_dec, inner.b_dec
        self.cfg.architecture = f"tsae_{cfg.activation}"
        self.cfg.apply_b_dec_to_input = cfg.apply_b_dec_to_input
        self.to(device=torch.device(device), dtype=dtype)
        self.cfg.dtype = str(dtype).removeprefix("torch.")
        self.cfg.device = str(device)
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> SAEBenchSAE:
        """As in PyTorch, except that the autoencoder stays in inference mode, without thresholds from the batch."""
        super().train(mode)
        self.inner.eval()
        return self

    def encode(self, x: Tensor) -> Tensor:
        """Features (..., L, d_sae) of activations (..., L, d_in)."""
        segments = torch.ones(x.shape[:-1], dtype=torch.int32, device=x.device)
        if x.dim() > 1:
            segments[..., 0] = 0
        return self.inner.encode(x.to(self.W_enc.dtype), segments if x.dim() > 1 else None).to(x.dtype)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruction (..., L, d_in) of features (..., L, d_sae)."""
        return self.inner.decode(feature_acts.to(self.W_dec.dtype)).to(feature_acts.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``decode(encode(x))``."""
        return self.decode(self.encode(x))


@torch.no_grad()
def _unit_norm(sae: SparseAutoencoder) -> SparseAutoencoder:
    """A copy of ``sae`` in ``eval()`` mode with decoder rows of norm 1 and the same reconstruction."""
    copy = SparseAutoencoder(sae.cfg).eval()
    state = {name: tensor.detach().cpu().clone() for name, tensor in sae.state_dict().items()}
    copy.load_state_dict(state)
    norm = copy.W_dec.norm(dim=1)
    if torch.allclose(norm, torch.ones_like(norm), atol=1e-5):
        return copy
    if not sae.cfg.kind.rescalable or sae.cfg.layer_norm != "none" or sae.cfg.hysteresis == "path":
        raise UserError(
            f"SAEBench needs decoder rows of norm 1, but these have norms from {norm.min():.3g} to {norm.max():.3g}, "
            f"and the activation {sae.cfg.activation!r} (layer_norm {sae.cfg.layer_norm!r}) does not allow rescaling "
            "features; train with sae.unit_norm_decoder."
        )
    norm = norm.clamp(min=1e-8)
    copy.W_dec.div_(norm[:, None])
    copy.W_enc.mul_(norm)
    for tensor in (copy.b_enc, copy.threshold, copy.release):
        tensor.mul_(norm)
    copy.update_threshold_parameters()
    return copy
