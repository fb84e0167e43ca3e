"""What `encode` and `decode` are given: no token at all, every dtype, several sequences at once."""

from __future__ import annotations

import pytest
import torch
from tiny_sae import D_IN, D_SAE, make
from torch import Tensor

from tsae.sae.kinds import KINDS
from tsae_kernels import available_backends

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BACKENDS = [name for name, state in available_backends().items() if state == "ok"]
OPTIONS = [{"activation": kind} for kind in KINDS] + [
    {"activation": "schmitt", "hysteresis": "two-sided"},
    {"activation": "topk", "groups": (10, D_SAE)},
    {"activation": "relu", "layer_norm": "pre"},
    {"activation": "topk", "layer_norm": "post"},
]


def activations(*shape: int) -> Tensor:
    return torch.randn(*shape, D_IN, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_token_gives_no_features(options: dict[str, object], training: bool) -> None:
    sae = make(**options)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    sae.train(training)
    for lead in ((2, 0), (0, 5), (0, 0), (0,), (2, 3, 0), (0, 3, 4)):
        for segments in (None, torch.zeros(lead, dtype=torch.int32)):
            x = activations(*lead).requires_grad_()
            h = sae.encode(x, segments)
            assert h.shape == (*lead, D_SAE)
            assert h.dtype == x.dtype
            assert sae.decode(h).shape == x.shape
            assert [part.shape for part in sae.decode_prefixes(h)] == [x.shape] * max(len(sae.cfg.groups), 1)
            sae(x, segments).sum().backward()
            assert x.grad is not None
    for name, value in sae.state_dict().items():  # a batch without tokens says nothing about thresholds
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("options", [*OPTIONS, {"activation": "relu", "apply_b_dec_to_input": False}], ids=str)
@pytest.mark.parametrize("given", DTYPES, ids=str)
@pytest.mark.parametrize("own", DTYPES, ids=str)
def test_every_pair_of_dtypes(own: torch.dtype, given: torch.dtype, options: dict[str, object]) -> None:
    """The arithmetic is in the autoencoder's dtype, whatever it is given."""
    right, x = make(**options), activations(2, 9)
    sae = make(**options).to(own)
    with torch.no_grad():
        h, expected = sae.encode(x.to(given)), right.encode(x)
        assert h.dtype == own
        xhat = sae.decode(h.to(given))
        assert xhat.dtype == own
        assert torch.equal(sae.encode(x.to(given)), sae.encode(x.to(given).to(own)))
        assert torch.equal(sae(x.to(given)), sae.decode(h))
    low = torch.bfloat16 if torch.bfloat16 in (own, given) else torch.float16 if torch.float16 in (own, given) else None
    if low is None:
        torch.testing.assert_close(h.float(), expected)
        torch.testing.assert_close(xhat.float(), right.decode(expected))
    else:  # an entry beside its threshold may fall on the other side
        assert ((h.float() - expected).abs() < 0.1).float().mean() > 0.9
        assert (xhat.float() - right.decode(expected)).abs().median() < 0.1


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sequences_together_and_one_by_one(options: dict[str, object]) -> None:
    sae, x = make(**options), activations(4, 3, 19)
    segments = torch.tensor([0] * 9 + [-1] + [1] * 9).expand(4, 3, 19)
    with torch.no_grad():
        for ids in (None, segments):
            together = sae.encode(x, ids)
            for i in range(4):
                for j in range(3):
                    alone = sae.encode(x[i, j], None if ids is None else ids[i, j])
                    torch.testing.assert_close(together[i, j], alone)
                    assert torch.equal(together[i, j] > 0, alone > 0)
            order = torch.tensor([2, 0, 3, 1])
            assert torch.equal(sae.encode(x[order], None if ids is None else ids[order]), together[order])


@pytest.mark.parametrize("hysteresis", ["causal", "two-sided"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_trigger_does_not_leak_into_the_next_sequence(backend: str, hysteresis: str) -> None:
    """A row that ends switched on, and one that starts between the thresholds, which alone is off."""
    sae = make(activation="schmitt", hysteresis=hysteresis)
    between = torch.full((5, D_SAE), 0.4) - sae.b_enc.detach()
    on = torch.full((5, D_SAE), 0.9) - sae.b_enc.detach()
    with torch.no_grad():
        h, _ = sae.activate(torch.stack([on, between, on, between, between]), backend=backend)
        assert [bool((row > 0).all()) for row in h] == [True, False, True, False, False]
        assert [bool((row > 0).any()) for row in h] == [True, False, True, False, False]
        # The same within a row, at a new segment and at an excluded position.
        row = torch.cat([on, between])[None]
        assert (sae.activate(row, backend=backend)[0] > 0).all()
        for ids in ([0] * 5 + [1] * 5, [0] * 4 + [-1] + [0] * 5):
            h, _ = sae.activate(row, segments=torch.tensor([ids]), backend=backend)
            assert not (h[0, 5:] > 0).any(), ids
