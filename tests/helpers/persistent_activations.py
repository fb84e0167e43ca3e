"""Activations made of sparse features that last, and autoencoders that know them, for tests of the bits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import tsae.data.harvest
from tsae.data.sequences import TokenBatch
from tsae.evaluation.evaluator import evaluate

B, T, D, FEATURES = 48, 64, 32, 48


class Activations:
    """x [B, T, D] = sum of features on two-state chains, and white noise of variance 0.01 per dimension."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(FEATURES, D, generator=generator)
        self.W_dec = directions / directions.norm(dim=1, keepdim=True)  # [FEATURES, D]
        stays = torch.linspace(0.2, 0.95, FEATURES)
        starts = 0.06 * (1 - stays) / 0.94  # a density of 6 %
        draws = torch.rand(B, T, FEATURES, generator=generator)
        on = torch.zeros_like(draws)
        on[:, 0] = (draws[:, 0] < 0.06).float()
        for t in range(1, T):
            on[:, t] = (draws[:, t] < torch.where(on[:, t - 1] > 0, stays, starts)).float()
        self.h = on * (1 + torch.empty_like(on).exponential_(generator=generator))
        noise = 0.1 * torch.randn(B, T, D, generator=generator)
        self.x = self.h @ self.W_dec + noise
        self.lm = SimpleNamespace(name="no model", widths={1: D})
        self.batch = TokenBatch(torch.arange(B)[:, None].expand(B, 1 + T), torch.zeros(B, T, dtype=torch.int32))
        self.patch(monkeypatch)

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make these the activations of any language model."""
        x = torch.cat([torch.zeros(B, 1, D), self.x], dim=1)
        monkeypatch.setattr(tsae.data.harvest, "activations", lambda lm, tokens, layer: x[tokens[:, 0]])

    def metrics(self, sae: nn.Module) -> dict:
        """The content of eval.json, without the language model's."""
        return evaluate(sae, self.lm, [self.batch], layer=1, ce_sequences=0).metrics


class Code(nn.Module):
    """An autoencoder with given features of each sequence: `encode` looks the sequence up by its activations."""

    def __init__(self, x: Tensor, h: Tensor, W_dec: Tensor, b_dec: Tensor | None = None) -> None:
        super().__init__()
        self.W_dec = nn.Parameter(W_dec)  # [d_sae, d]
        self.b_dec = nn.Parameter(torch.zeros(W_dec.shape[1]) if b_dec is None else b_dec)
        self.rows = {row.numpy().tobytes(): features for row, features in zip(x, h, strict=True)}
        self.like = h[0]

    def encode(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        # A sequence in another order, as in the control, is given the features of none.
        return torch.stack([self.rows.get(row.numpy().tobytes(), torch.zeros_like(self.like)) for row in x])

    def decode(self, h: Tensor) -> Tensor:
        return h @ self.W_dec + self.b_dec

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        return self.decode(self.encode(x, segments))


def least_squares(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The decoder, [d_sae, d] and [d], that reconstructs x [B, T, d] best from h [B, T, d_sae]."""
    features = torch.cat([h, torch.ones_like(h[..., :1])], dim=2).flatten(0, 1).double()
    solution = torch.linalg.lstsq(features, x.flatten(0, 1).double(), driver="gelsd").solution.float()
    return solution[:-1].contiguous(), solution[-1].contiguous()
