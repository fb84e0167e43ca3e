"""`persistence_excess` and its control on shuffled tokens, of autoencoders whose features are slow signals."""

import math
from types import SimpleNamespace

import pytest
import torch

import tsae.data.harvest
from tsae.config import SAEConfig
from tsae.data.sequences import TokenBatch
from tsae.evaluate import evaluate
from tsae.evaluation.metrics import shuffle_within_segments
from tsae.sae.model import SparseAutoencoder


class Latents:
    """Synthetic activations: slow latents along separate directions, with a large mean."""

    def __init__(self, rho: float, monkeypatch: pytest.MonkeyPatch, B: int = 24, T: int = 256, k: int = 16) -> None:
        generator = torch.Generator().manual_seed(0)
        latent = torch.randn(B, T, k, generator=generator)
        for t in range(1, T):
            latent[:, t] = rho * latent[:, t - 1] + math.sqrt(1 - rho**2) * latent[:, t]
        directions = torch.linalg.qr(torch.randn(32, k, generator=generator)).Q.T  # [k, 32]
        self.x = torch.cat([torch.zeros(B, 1, 32), latent @ directions + 100.0], dim=1)
        self.directions = directions
        self.lm = SimpleNamespace(name="no model", widths={1: 32})
        self.batch = TokenBatch(torch.arange(B)[:, None].expand(B, 1 + T), torch.zeros(B, T, dtype=torch.int32))
        monkeypatch.setattr(tsae.data.harvest, "activations", lambda lm, tokens, layer: self.x[tokens[:, 0]])

    def temporal(self, release_ratio: float, seed: int = 0) -> dict:
        """The metrics of an autoencoder whose features are the latents above 1.5."""
        k = len(self.directions)
        sae = SparseAutoencoder(SAEConfig(d_in=32, d_sae=k, k=2, activation="schmitt"))
        sae.W_enc.data.copy_(self.directions.T)
        sae.W_dec.data.copy_(self.directions)
        sae.b_dec.data.fill_(100.0)
        sae.threshold.fill_(1.5)
        sae.release.fill_(1.5 * release_ratio)
        return evaluate(sae, self.lm, [self.batch], layer=1, ce_sequences=0, seed=seed).metrics["temporal"]


def test_persistence_on_shuffled_tokens(monkeypatch):
    """A plain autoencoder's excess is owed to the order of the text and falls to 0 without it; what hysteresis makes of
    tokens in any order is left over and reported."""
    slow = Latents(0.6, monkeypatch)
    plain, schmitt = slow.temporal(1.0), slow.temporal(0.3)
    assert plain["persistence_excess"] > 0.25
    assert abs(plain["persistence_excess_shuffled"]) < 0.015
    assert schmitt["persistence_excess"] > plain["persistence_excess"] + 0.3
    assert 0.2 < schmitt["persistence_excess_shuffled"] < schmitt["persistence_excess"] - 0.3
    for metrics in (plain, schmitt):
        assert metrics["support_bits"] < 0.95 * metrics["support_bits_shuffled"]
        assert metrics["support_bits"] < metrics["support_bits_memoryless"]
    # Without an order in the text both are equal.
    fast = Latents(0.0, monkeypatch)
    for ratio in (1.0, 0.3):
        metrics = fast.temporal(ratio)
        assert metrics["persistence_excess"] == pytest.approx(metrics["persistence_excess_shuffled"], abs=0.02)
        assert metrics["support_bits"] == pytest.approx(metrics["support_bits_shuffled"], rel=0.02)


def test_the_shuffled_control_equals_the_definition(monkeypatch):
    """Activations permuted inside their segment, encoded, and counted one pair and feature at a time."""
    slow = Latents(0.8, monkeypatch, B=6, T=64)
    slow.batch.segments[:] = torch.arange(64) // 9
    slow.batch.segments[2, 10:14] = -1
    found = slow.temporal(0.5, seed=3)["persistence_excess_shuffled"]
    mixed = shuffle_within_segments(slow.x[:, 1:], slow.batch.segments, torch.Generator().manual_seed(3)).double()
    pre = (mixed - 100.0) @ slow.directions.double().T
    excess = []
    for j in range(pre.shape[2]):
        on, before = torch.zeros(pre.shape[:2], dtype=torch.bool), None
        for b in range(pre.shape[0]):
            state = False
            for t in range(pre.shape[1]):
                segment = int(slow.batch.segments[b, t])
                state = (state and t > 0 and segment == before and bool(pre[b, t, j] > 0.75)) or bool(
                    pre[b, t, j] > 1.5
                )
                state, before = state and segment >= 0, segment
                on[b, t] = state
        counted = slow.batch.segments >= 0
        pairs = (slow.batch.segments[:, 1:] == slow.batch.segments[:, :-1]) & counted[:, 1:]
        density = float(on[counted].double().mean())
        if int(on.sum()) >= 20:
            starts = int((on[:, :-1] & pairs).sum())
            stays = int((on[:, :-1] & on[:, 1:] & pairs).sum()) / starts
            excess.append((stays - density) / (1 - density))
    assert len(excess) > 10
    assert found == pytest.approx(sum(excess) / len(excess), rel=1e-6)
