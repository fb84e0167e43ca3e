"""The active features of every token as lists of fixed length: what the objectives read of features that are not dense.

No shape here depends on values, so a host does not wait for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tsae.sae.straight_through import GatedEntries


@dataclass(frozen=True)
class FeatureLists:
    """Features (B, T, d_sae) as lists of capacity C: `tsae_kernels.sparse_features.SparseFeatures` and their shape.

    values: (B * T, C), 0 past the count; indices: (B * T, C) int32, ascending, d_sae past the count
    counts: (B * T) int32, may exceed C; shape: (B, T, d_sae)
    gate: of lists that also hold features that are nearly on, whose value is 0 and has no gradient in `values`
    """

    values: Tensor
    indices: Tensor
    counts: Tensor
    shape: tuple[int, int, int]
    gate: GatedEntries | None = None

    @property
    def device(self) -> torch.device:
        """Of the lists."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    def detach(self) -> FeatureLists:
        """The same without gradient."""
        return FeatureLists(self.values.detach(), self.indices, self.counts, self.shape)

    def l1(self) -> Tensor:
        """``sum_j |h_j|`` of every token, (B, T), float32 (float64 for float64)."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        return self.values.abs().sum(-1, dtype=dtype).view(self.shape[:2])

    def rows(self, tokens: Tensor, width: int) -> Tensor:
        """The first ``width`` features of some tokens, dense (n, width); tokens: (n) int64, indices into B * T."""
        columns = self.indices.index_select(0, tokens).clamp(max=width).long()  # `width` is dropped below
        values = self.values.index_select(0, tokens)
        return values.new_zeros(len(tokens), width + 1).scatter(1, columns, values)[:, :width]

    def next_values(self) -> Tensor:
        """For every entry the value of its feature at the next token of the row (0 at the last), (B * T, C)."""
        (B, T, _), C = self.shape, self.values.shape[1]
        indices, values = self.indices.view(B, T, C), self.values.view(B, T, C)
        after, later = indices[:, 1:].contiguous(), values[:, 1:]
        place = torch.searchsorted(after, indices[:, :-1].contiguous()).clamp(max=C - 1)
        found = torch.where(after.gather(2, place) == indices[:, :-1], later.gather(2, place), 0.0)
        return torch.cat([found, values.new_zeros(B, 1, C)], 1).view(B * T, C)

    def squared_steps(self, width: int) -> Tensor:
        """``sum_j (h_{t+1,j} - h_{t,j})^2`` over the first ``width`` features, (B, T), without meaning at the last t;
        float32 (float64 for float64)."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        values = torch.where(self.indices < width, self.values, 0.0).to(dtype)
        square = values.square().sum(1).view(self.shape[:2])
        product = (values * self.next_values().to(dtype)).sum(1).view(self.shape[:2])
        return square + torch.cat([square[:, 1:], square[:, :1]], 1) - 2.0 * product

    def sum_by_feature(self, entries: Tensor) -> Tensor:
        """(d_sae): the sum of ``entries`` (B * T, C) over the entries of each feature, in their dtype."""
        out = entries.new_zeros(self.shape[2] + 1)
        return out.index_add_(0, self.indices.flatten().long(), entries.flatten())[:-1]
