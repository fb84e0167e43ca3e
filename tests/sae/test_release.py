"""A release ratio changed after training, at the same L0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tsae.config import SAEConfig
from tsae.errors import UserError
from tsae.sae.model import SparseAutoencoder
from tsae.sae.release import with_release_ratio

D_IN, K = 8, 30


def make(activation: str, **options: Any) -> SparseAutoencoder:
    cfg = SAEConfig(d_in=D_IN, d_sae=K, k=4, activation=activation, **options)  # type: ignore[arg-type]
    sae = SparseAutoencoder(cfg, generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        sae.b_enc.copy_(0.2 * torch.randn(K, generator=torch.Generator().manual_seed(1)))
        sae.b_dec.fill_(0.1)
    sae.threshold.copy_(torch.linspace(0.8, 1.6, K))
    sae.release.copy_(0.5 * sae.threshold)
    sae.update_threshold_parameters()
    return sae


def batches() -> list[tuple[Tensor, Tensor]]:
    out = []
    for seed in range(3):
        x = torch.randn(4 - seed, 20, D_IN, generator=torch.Generator().manual_seed(seed))
        segments = torch.zeros(4 - seed, 20, dtype=torch.int32)
        segments[0, 8:] = 1
        segments[0, 3] = -1
        out.append((x, segments))
    return out


def active(sae: SparseAutoencoder) -> Tensor:
    return torch.cat([(sae.encode(x, segments) > 0)[segments >= 0] for x, segments in batches()])


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize(
    ("activation", "options"),
    [
        ("schmitt", {"release_ratio": 0.5}),
        ("schmitt", {"release_ratio": 0.5, "hysteresis": "two-sided", "steering": "exact"}),
        ("schmitt", {"layer_norm": "pre"}),
        ("batchtopk", {}),
        ("jumprelu", {}),
        ("jumprelu_schmitt", {}),
    ],
)
def test_as_many_features_are_active_as_before(activation: str, options: dict[str, Any], ratio: float) -> None:
    sae = make(activation, **options)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    released = with_release_ratio(sae, ratio, batches())
    out, own = released.sae, active(sae)
    assert (out.cfg.activation, out.cfg.release_ratio, out.training) == ("schmitt", ratio, False)
    assert abs(int(active(out).sum()) - int(own.sum())) <= 20  # one stretch, whose entries switch together
    assert released.l0 == pytest.approx(float(own.sum(-1).float().mean()))
    torch.testing.assert_close(out.threshold, released.factor * sae.threshold)  # features keep their proportions
    torch.testing.assert_close(out.release, ratio * out.threshold)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())
    hysteresis = 0.5 if "schmitt" in activation else 1.0
    if ratio == hysteresis:
        assert released.factor == pytest.approx(1.0, abs=0.02)
        assert (active(out) != own).sum() <= 20
    else:
        assert (released.factor > 1.0) == (ratio < hysteresis)


def test_without_active_features_none_become_active() -> None:
    sae = make("schmitt")
    sae.threshold.fill_(1e6)
    released = with_release_ratio(sae, 0.2, batches())
    assert released.l0 == 0.0
    assert not active(released.sae).any()


@pytest.mark.parametrize(("activation", "layer_norm"), [("topk", "none"), ("relu", "pre"), ("batchtopk", "post")])
def test_activations_without_thresholds_are_refused(activation: str, layer_norm: str) -> None:
    sae = make(activation, layer_norm=layer_norm)
    with pytest.raises(UserError, match=f"activation is '{activation}' .layer_norm '{layer_norm}'.; a release"):
        with_release_ratio(sae, 0.5, batches())
