"""Our autoencoders as SAEBench's custom SAEs, for all of its evaluations.

    sae = SAEBenchSAE(tsae.load("runs/latest"), model_name="pythia-70m-deduped", hook_layer=4)
    sae_bench.evals.core.main.multiple_evals([("my-sae", sae)], ...)

Needs sae-bench (docs/formats.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsae.errors import UserError
from tsae.sae.model import SparseAutoencoder

try:
    from sae_bench.custom_saes.base_sae import BaseSAE
except ImportError as error:
    raise UserError(
        f"tsae.integrations.sae_bench needs sae-bench, which cannot be imported ({error}); install it as "
        "docs/formats.md says."
    ) from None


class SAEBenchSAE(BaseSAE):
    """A `SparseAutoencoder` behind SAEBench's interface.

    Activations are (L, d_in), taken as one sequence, or (B, L, d_in), in any dtype; features come back in that dtype.
    The first position of a sequence is BOS in SAEBench: hysteresis starts anew behind it, as it did in training, where
    the autoencoder never saw BOS.

    The decoder's rows have norm 1, as SAEBench checks: norms that are not go into the encoder, the biases and the
    thresholds, which changes features' scale and nothing else. It is refused where which features are active, or their
    shape, would change (topk; gelu; layer normalization).

    Args:
        sae: the autoencoder, which is copied.
        model_name: TransformerLens's name of the language model.
        hook_layer: block whose output it encodes, counted from 0.
        device, dtype: of the weights.
        hook_name: default `blocks.{hook_layer}.hook_resid_post`.
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
        cfg = sae.cfg
        super().__init__(cfg.d_in, cfg.d_sae, model_name, hook_layer, torch.device("cpu"), torch.float32, hook_name)
        inner = _unit_norm(sae)
        self.inner = inner
        # One tensor behind both names, which `to` keeps.
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = inner.W_enc, inner.b_enc, inner.W_dec, inner.b_dec
        self.cfg.architecture = f"tsae_{cfg.activation}"
        self.cfg.apply_b_dec_to_input = cfg.apply_b_dec_to_input
        self.to(device=torch.device(device), dtype=dtype)
        self.cfg.dtype = str(dtype).removeprefix("torch.")
        self.cfg.device = str(device)
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> SAEBenchSAE:
        """As in PyTorch, but the autoencoder keeps to inference: in training a threshold may come from the batch."""
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
    """A copy of ``sae`` in ``eval()`` mode whose decoder has rows of norm 1, for the same reconstruction."""
    copy = SparseAutoencoder(sae.cfg).eval()
    state = {name: tensor.detach().cpu().clone() for name, tensor in sae.state_dict().items()}
    copy.load_state_dict(state)
    norm = copy.W_dec.norm(dim=1)
    if torch.allclose(norm, torch.ones_like(norm), atol=1e-5):
        return copy
    if sae.cfg.activation in ("topk", "gelu") or sae.cfg.layer_norm != "none":
        raise UserError(
            f"SAEBench wants decoder rows of norm 1, and here they are from {norm.min():.3g} to {norm.max():.3g}; with "
            f"the activation {sae.cfg.activation!r} (layer_norm {sae.cfg.layer_norm!r}) they cannot be scaled without "
            "changing the features."
        )
    norm = norm.clamp(min=1e-8)
    copy.W_dec.div_(norm[:, None])
    copy.W_enc.mul_(norm)
    for tensor in (copy.b_enc, copy.threshold, copy.release):
        tensor.mul_(norm)
    copy.adopt_thresholds()
    return copy
