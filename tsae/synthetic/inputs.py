"""Autoencoders that read more than one token: a temporal crosscoder, and groups of features of running means.

Both are a `SparseAutoencoder` on another input, with the interface of one: `encode(x, segments)` and `decode(h)`, so
that they are measured as any other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tsae.sae.model import SparseAutoencoder
from tsae_kernels import leaky_recurrence


def running_means(x: Tensor, segments: Tensor | None, constants: tuple[float, ...]) -> Tensor:
    """Exponential running means of x within segments, with weights exp(-age / constant) normalized to a sum of 1.

    x: (B, T, d); segments: (B, T) or None
    out: (B, T, len(constants) d), float32; the mean at t includes x_t, and is x_t at the start of a segment
    """
    out, ones = [], torch.ones_like(x[..., :1], dtype=torch.float32)
    for constant in constants:
        decay = torch.tensor(-1.0 / constant).exp().to(x.device)
        weight = leaky_recurrence(ones, decay.expand(1), segments)  # 0 at excluded positions
        mean = leaky_recurrence(x.float(), decay.expand(x.shape[-1]), segments) / weight.clamp(min=1e-12)
        out.append(mean)
    return torch.cat(out, dim=-1)


class RunningMeans(nn.Module):
    """Features of which groups read a running mean of x in the place of x.

    The first features read x_t; then ``size`` features read the running mean of each time constant.

    Args:
        inner: a transcoder from ``[x, running means]`` to x, whose encoder has the zeros of `encoder_mask`.
        constants: time constants in tokens.
    """

    def __init__(self, inner: SparseAutoencoder, constants: tuple[float, ...]) -> None:
        super().__init__()
        self.inner, self.constants = inner, constants

    def input(self, x: Tensor, segments: Tensor | None) -> Tensor:
        """(B, T, d) to (B, T, (1 + constants) d)."""
        return torch.cat([x.float(), running_means(x, segments, self.constants)], dim=-1)

    def encode(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """Features (B, T, d_sae) of activations (B, T, d)."""
        return self.inner.encode(self.input(x, segments), segments)

    def decode(self, h: Tensor) -> Tensor:
        """Reconstruction (B, T, d)."""
        return self.inner.decode(h)

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """``decode(encode(x))``."""
        return self.decode(self.encode(x, segments))


def encoder_mask(d: int, d_sae: int, size: int, groups: int) -> Tensor:
    """(d (1 + groups), d_sae): 1 where the encoder of `RunningMeans` may read, the last ``size`` features for each
    group."""
    mask = torch.zeros(d * (1 + groups), d_sae)
    first = d_sae - size * groups
    mask[:d, :first] = 1
    for group in range(groups):
        mask[d * (group + 1) : d * (group + 2), first + size * group : first + size * (group + 1)] = 1
    return mask


def windows(x: Tensor, segments: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Adjacent windows of each row that do not overlap.

    x: (B, T, d) with T a multiple of the window; segments: (B, T)
    out: (B, T / window, window d), and their segments, -1 for a window that is not of one segment
    """
    stacked = x.reshape(x.shape[0], -1, window * x.shape[-1])
    ids = segments.reshape(segments.shape[0], -1, window)
    return stacked, torch.where((ids == ids[..., :1]).all(-1), ids[..., 0], -1)


class Crosscoder(nn.Module):
    """A temporal crosscoder (JfN7nRdBxA): one set of features for a window of tokens, which it reads and reconstructs.

    Windows do not overlap and begin at multiples of ``window`` in a row. A token's features are those of its window,
    which holds later tokens, so this is not causal. A window that crosses the boundary of segments is encoded once for
    each, with the tokens of others replaced by the mean.

    Args:
        inner: an autoencoder of windows, (..., window d), with ``apply_b_dec_to_input``.
        window: tokens.
    """

    def __init__(self, inner: SparseAutoencoder, window: int) -> None:
        super().__init__()
        self.inner, self.window = inner, window

    def encode(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """For each token the features of its window: (B, T, d_sae) of (B, T, d)."""
        b, t, d = x.shape
        ids = x.new_zeros((b, t), dtype=torch.int32) if segments is None else segments
        rest = -t % self.window
        x = nn.functional.pad(x, (0, 0, 0, rest)).view(b, -1, self.window, d)
        ids = nn.functional.pad(ids, (0, rest), value=-1).view(b, -1, self.window)
        absent = self.inner.b_dec.view(self.window, d)
        codes = []
        for offset in range(self.window):
            own = (ids == ids[..., offset : offset + 1]) & (ids >= 0)  # [B, W, window]
            codes.append(self.inner.encode(torch.where(own[..., None], x, absent).flatten(2)))
        return torch.stack(codes, dim=2).flatten(1, 2)[:, :t]

    def decode(self, h: Tensor) -> Tensor:
        """Each token from the features of its window by the decoder of its place in it: (B, T, d) of (B, T, d_sae)."""
        d = self.inner.cfg.d_in // self.window
        out = h.new_empty(*h.shape[:-1], d)
        for offset in range(self.window):
            columns = slice(offset * d, (offset + 1) * d)
            part = h[:, offset :: self.window] @ self.inner.W_dec[:, columns]
            out[:, offset :: self.window] = part + self.inner.b_dec[columns]
        return out

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """``decode(encode(x))``."""
        return self.decode(self.encode(x, segments))

    def window_codes(self, h: Tensor, segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The codes behind the features of the tokens: one for each window and each segment in it.

        h: (B, T, d_sae), from `encode`; segments: (B, T)
        out: (B, N, d_sae), their segments (B, N), -1 where a row has fewer, and the token at which each begins (B, N)
        """
        first = segments >= 0
        position = torch.arange(segments.shape[1], device=segments.device)
        first[:, 1:] &= (position[1:] % self.window == 0) | (segments[:, 1:] != segments[:, :-1])
        places = [row.nonzero().squeeze(1) for row in first]
        rows = [h[b, place] for b, place in enumerate(places)]
        ids = [segments[b, place] for b, place in enumerate(places)]
        return (
            pad_sequence(rows, batch_first=True),
            pad_sequence(ids, batch_first=True, padding_value=-1),
            pad_sequence(places, batch_first=True),
        )
