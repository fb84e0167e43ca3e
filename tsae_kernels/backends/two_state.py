"""The costs of a two-state path in the form that the recursion uses: docs/mathematics.md, section 8."""

from __future__ import annotations

import torch
from torch import Tensor


def path_levels(transition_cost: Tensor, start_cost: Tensor, dtype: torch.dtype) -> Tensor:
    """[5, k] in `dtype`: stay_off, stay_on, sign, offset, start.

    Let e be the excess cost of the best path that is on at t over the best that is off at t. Then

    * the best path to off at t + 1 is on at t if e < stay_off, and the best path to on if e < stay_on;
    * the excess at t + 1 is sign * clamp(e, between the two) + offset, plus -z^2 (infinite where on is not allowed);
    * at a segment's first position it is start - z^2.

    The clamp gives each difference of two costs without forming either, so that e may be infinite.

    transition_cost: [2, 2, k] (from, to), start_cost: [2, k]; 0 is off, 1 is on
    """
    (off_off, off_on), (on_off, on_on) = transition_cost.to(dtype)
    stay_off, stay_on = off_off - on_off, off_on - on_on
    lasts = stay_off <= stay_on
    sign = torch.where(lasts, 1.0, -1.0).to(dtype)
    offset = torch.where(lasts, on_on - off_off, off_on - on_off)
    start_off, start_on = start_cost.to(dtype)
    return torch.stack([stay_off, stay_on, sign, offset, start_on - start_off])
