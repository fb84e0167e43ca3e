"""The decays of the activation `persistent` (Persistent SAE, arXiv 2607.17117).

    h_t = l_j h_{t-1} + (1 - l_j) a_t        h_{t-1} = 0 at the start of a segment

a is the sparse code of single tokens, l_j a decay per feature, learned. The recurrence is
`tsae_kernels.leaky_recurrence`.
"""

from __future__ import annotations

from torch import Tensor

LARGEST_DECAY = 0.999


def decay_of(logit: Tensor) -> Tensor:
    """l = 0.999 sigmoid(logit), of any shape."""
    return LARGEST_DECAY * logit.sigmoid()


def logit_of(decay: Tensor) -> Tensor:
    """The inverse of `decay_of`, finite for every decay from 0 to 0.999."""
    return (decay / LARGEST_DECAY).logit(1e-6)
