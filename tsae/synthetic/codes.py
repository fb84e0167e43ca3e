"""The code behind an autoencoder's features: the values that determine them all, which its L0 and bits count."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tsae.errors import UserError
from tsae.evaluation.evaluator import decoder_norms
from tsae.sae.model import SparseAutoencoder
from tsae.synthetic.inputs import Crosscoder, RunningMeans

Code = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x [B, T, d], h [B, T, d_sae], segments [B, T]) -> code [B, N, d_sae] and its segments [B, N], negative = none."""


class SparseInput:
    """The values a of an autoencoder with a recurrence, and what an error in one of them costs.

    An error e in a_t makes errors (1 - l) l^n e in what follows, in all e^2 (1 - l) / (1 + l) in square.

    Raises:
        UserError: it has no recurrence.
    """

    def __init__(self, sae: SparseAutoencoder) -> None:
        if not sae.cfg.kind.recurrent:
            raise UserError(f"The autoencoder's activation is {sae.cfg.activation!r}; name a run of persistent.")
        decay = sae.decay.double()
        self.norms = sae.W_dec.detach().double().norm(dim=1) * ((1 - decay) / (1 + decay)).sqrt()
        self.sae = copy.deepcopy(sae)
        self.sae.decay.zero_()  # h = a

    def codes(self, x: Tensor, segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As those of `Crosscoder.window_codes`: one of each token."""
        return self.sae.encode(x, segments), segments, torch.arange(x.shape[1]).expand(segments.shape)


def code_of(sae: nn.Module) -> tuple[Code, Tensor]:
    """The code of an autoencoder's features, and [d_sae] the root of the squared error that an error of 1 makes.

    That of a crosscoder has one position for each window and each segment in it; that of a recurrence is what it
    integrates; any other's are the features.

    sae: a `SparseAutoencoder`, `Crosscoder` or `RunningMeans`
    """
    if isinstance(sae, Crosscoder):
        crosscoder = sae
        return lambda x, h, segments: crosscoder.window_codes(h, segments)[:2], _norms(sae.inner)
    inner = sae.inner if isinstance(sae, RunningMeans) else sae
    assert isinstance(inner, SparseAutoencoder)
    if inner.cfg.kind.recurrent:
        sparse = SparseInput(inner)
        return lambda x, h, segments: sparse.codes(x, segments)[:2], sparse.norms
    return lambda x, h, segments: (h, segments), _norms(inner)


def _norms(sae: SparseAutoencoder) -> Tensor:
    return decoder_norms(sae, sae.cfg.d_sae)


def directions_of(sae: nn.Module) -> Tensor:
    """[d_sae, d] what each feature adds to a token, any norm.

    Of a crosscoder, the mean of a feature's rows over the positions of the window: a feature that is the same
    direction at every position has that direction, one that writes to a single position has that position's, and
    rows that disagree cancel. The best position would be the largest of several cosines and favour long windows.
    """
    if isinstance(sae, Crosscoder):
        rows: Tensor = sae.inner.W_dec.unflatten(1, (sae.window, -1))  # [d_sae, window, d]
        return rows.mean(1)
    inner = sae.inner if isinstance(sae, RunningMeans) else sae
    assert isinstance(inner, SparseAutoencoder)
    return inner.W_dec
