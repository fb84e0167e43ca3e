"""Against the real sparsify: a saved SparseCoder loads here and computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peer_cases import D_IN, D_SAE, K, activations, same_to

import tsae

sparsify = pytest.importorskip("sparsify", reason="eai-sparsify is not installed; make peers")


def test_their_folders_load_here(tmp_path: Path) -> None:
    cfg = sparsify.SparseCoderConfig(num_latents=D_SAE, k=K)
    theirs, x = sparsify.SparseCoder(D_IN, cfg), activations(mean=0.5, scale=1.0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    theirs.save_to_disk(tmp_path / "layers.3")
    ours = tsae.load(tmp_path / "layers.3")
    with torch.no_grad():
        flat = x.flatten(0, 1)
        out = theirs.encode(flat)
        h = torch.zeros(len(flat), D_SAE).scatter_(1, out.top_indices, out.top_acts)
        same_to(ours.encode(x).flatten(0, 1), h)
        same_to(ours(x).flatten(0, 1), theirs(flat).sae_out)
    assert ours.cfg.k == K


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transcode": True}, "transcoder"),
        ({"skip_connection": True}, "skip connection"),
        ({"activation": "groupmax"}, "groupmax"),
    ],
)
def test_what_we_cannot_compute_is_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    sparsify.SparseCoder(D_IN, sparsify.SparseCoderConfig(num_latents=D_SAE, k=4, **options)).save_to_disk(tmp_path)
    with pytest.raises(tsae.UserError, match=message):
        tsae.load(tmp_path)
