"""Gradients of the weights of a step on lists of active features, by rows and outside autograd.

`sparse_features.py` leaves what they need in a `DeferredGradients`; an optimizer that updates rows takes the result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tsae_kernels.sparse_ops import Entries

_ops = torch.ops.tsae_kernels


class WeightGradients(NamedTuple):
    """Gradients of the weights by rows; only rows of features that `fired` are defined in the first two.

    encoder: [k, d], of W_enc.T
    decoder: [k, d], of W_dec
    bias:    [k], of b_enc
    fired:   [k] bool
    encoder_square, decoder_square: [k], the squared norm of each row
    along:   [k], the product of each row of `decoder` with W_dec's; its component along that row is ``along / w``
        times the row, for w = `weight_square` [k], the squared norm of W_dec's row

    The vectors are 0 where a feature did not fire, the last two also if `weight_gradients` got no W_dec. All are
    float32 (float64 where an operand is).
    """

    encoder: Tensor
    decoder: Tensor
    bias: Tensor
    fired: Tensor
    encoder_square: Tensor
    decoder_square: Tensor
    along: Tensor
    weight_square: Tensor

    @torch.no_grad()
    def add_rows(
        self, features: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor, W_dec: Tensor | None = None
    ) -> WeightGradients:
        """These gradients plus dense ones of a few features, such as AuxK's of dead features. Changes them in place.

        features: [n] int64, all different; encoder, decoder: [n, d]; bias: [n]
        W_dec: as in `weight_gradients`
        out: gradients in which those features count as fired
        """
        fired = self.fired[features][:, None]
        sums = []
        for rows, more in ((self.encoder, encoder), (self.decoder, decoder)):
            sums.append(torch.where(fired, rows[features], 0) + more.to(rows.dtype))
            rows.index_copy_(0, features, sums[-1])
        self.bias.index_add_(0, features, bias.to(self.bias.dtype))
        self.encoder_square.index_copy_(0, features, sums[0].square().sum(1))
        self.decoder_square.index_copy_(0, features, sums[1].square().sum(1))
        if W_dec is not None:
            weight = W_dec[features].to(sums[1].dtype)
            self.along.index_copy_(0, features, (sums[1] * weight).sum(1))
            self.weight_square.index_copy_(0, features, weight.square().sum(1))
        return self._replace(fired=self.fired.index_fill(0, features, True))


class Piece(NamedTuple):
    """What the backward pass of one `encode_sparse` knows."""

    entries: Entries
    grad_pre: Tensor  # [E]
    x: Tensor  # [N, d]


class DeferredGradients:
    """Takes what `weight_gradients` needs from the backward pass of a training step, in place of autograd.

    Pass a new one to `encode_sparse` and `decode_sparse_features`, call ``backward``, then `weight_gradients`. The
    weights and the bias get no gradient from autograd. Several pieces of a batch, each with its forward and backward
    pass, may share one: their gradients are added.
    """

    def __init__(self) -> None:
        self._pieces: list[Piece] = []
        self._grads: list[Tensor] = []  # of xhat, [G, N, d]
        self._ends: list[int] = []
        self._backend = ""

    def record_encoder(self, piece: Piece, backend: str) -> None:
        """Called by the encoder's backward pass."""
        self._pieces.append(piece)
        self._backend = backend

    def record_decoder(self, grad: Tensor, ends: list[int]) -> None:
        """Called by the decoder's backward pass; grad: of xhat, [G, N, d]."""
        self._grads.append(grad)
        self._ends = ends


@torch.no_grad()
def weight_gradients(deferred: DeferredGradients, W_dec: Tensor | None = None) -> WeightGradients:
    """The gradients of W_enc, b_enc and W_dec, in one pass over the entries by feature.

    Sums run in a fixed order. Rows of features that did not fire are not written. With ``x - b_dec`` as the encoder's
    input, the gradient of b_dec through the encoder is ``-(W_enc @ bias)``, for `bias` of the result.

    deferred: after ``backward`` of a loss on the decoder's output
    W_dec: [k, d], for `along` and `weight_square`, with which an optimizer projects gradients and clips their norm
        without another pass over the rows
    out: `WeightGradients`

    Raises `RuntimeError` if the backward pass did not reach the encoder and the decoder.
    """
    pieces, grads = deferred._pieces, deferred._grads
    if not pieces or len(pieces) != len(grads):
        raise RuntimeError(
            "weight_gradients needs a backward pass through decode_sparse_features and encode_sparse, both called with "
            f"this DeferredGradients; it recorded {len(grads)} of the decoder and {len(pieces)} of the encoder"
        )
    (features, tokens, values, offsets), grad_pre, x, grad = _joined(pieces, grads)
    arguments = grad_pre, x, values, grad, W_dec, deferred._ends, False, deferred._backend
    encoder, decoder, bias, measures = _ops.sparse_weight_gradients(features, tokens, offsets, *arguments)
    return WeightGradients(encoder, decoder, bias, offsets[1:] > offsets[:-1], *measures.unbind())


def _joined(pieces: list[Piece], grads: list[Tensor]) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor]:
    """Entries by feature (features, tokens, values, offsets), grad_pre, x and the gradient of xhat of all pieces."""
    if len(pieces) == 1:
        _, *entries = pieces[0].entries
        return tuple(entries), pieces[0].grad_pre, pieces[0].x, grads[0]
    first, parts = 0, []
    for piece in pieces:
        parts.append(piece.entries.tokens + first)
        first += len(piece.x)
    features, order = torch.sort(torch.cat([piece.entries.features for piece in pieces]), stable=True)
    columns = torch.cat(parts), torch.cat([p.entries.values for p in pieces]), torch.cat([p.grad_pre for p in pieces])
    tokens, values, grad_pre = (column.index_select(0, order) for column in columns)
    offsets = torch.stack([piece.entries.offsets for piece in pieces]).sum(0, dtype=torch.int32)
    x, grad = torch.cat([piece.x for piece in pieces]), torch.cat(grads, dim=1)
    return (features, tokens, values, offsets), grad_pre, x, grad
