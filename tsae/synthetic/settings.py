"""Named settings of the benchmark: the published small one, and thousands of features."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from tsae.config import PositiveInt
from tsae.errors import UserError
from tsae.synthetic.chains import Chain, Source, rho_for
from tsae.utils.ranges import Range, at_least, check_ranges, positive

_below_one = Range("at least 0 and below 1", lambda value: 0 <= value < 1)
_density = Range("above 0 and below 1", lambda value: 0 < value < 1)


@dataclass
class Setting:
    """Made-up activations, and how long autoencoders are trained and measured on them."""

    features: PositiveInt = 2048
    """True features, in equal groups, one for each dwell time or autocorrelation."""
    width: PositiveInt = 256
    """Dimensions of the activations."""
    dwell: Annotated[tuple[float, ...], at_least(1)] = (2.0, 8.0, 32.0, 128.0)
    """Mean tokens for which a hidden state stays on, of each group; not used with `rho`."""
    rho: Annotated[tuple[float, ...], _below_one] = ()
    """Autocorrelation of hidden states from one token to the next, of each group, in place of `dwell`."""
    pi: Annotated[float, _density] = 0.00625
    """Share of tokens at which a hidden state is on."""
    emission: Annotated[float, Range("above 0 and at most 1", lambda value: 0 < value <= 1)] = 0.625
    """Probability that a feature is observed where its hidden state is on."""
    segment: Annotated[float, at_least(1)] = 512.0
    """Mean tokens per segment; hidden states of different segments are independent."""
    d_sae: PositiveInt = 2048
    """Features of the autoencoders."""
    steps: PositiveInt = 500
    """Optimizer steps."""
    batch: PositiveInt = 32
    """Sequences per step."""
    length: Annotated[int, at_least(2)] = 36
    """Tokens per sequence in training; a multiple of the windows of crosscoders."""
    lr: Annotated[float, positive] = 1e-3
    """Learning rate."""
    l1: Annotated[float, at_least(0)] = 0.04
    """Weight of the L1 penalty of `relu`."""
    eval_length: Annotated[int, at_least(2)] = 512
    """Tokens per sequence that are scored; the rates of the read-outs are estimated on as many, other sequences."""
    eval_sequences: PositiveInt = 128
    """Sequences that are scored."""

    def check(self) -> None:
        """Raise `UserError` for the first invalid value."""
        check_ranges(self)
        groups = len(self.rho or self.dwell)
        if not groups or self.features % groups:
            raise UserError(f"features is {self.features}; it must be a multiple of the {groups} dwell times or rhos.")
        shortest = 1 / (1 - self.pi)
        if not self.rho and min(self.dwell) < shortest:
            raise UserError(
                f"dwell is {self.dwell}; with pi = {self.pi} independent draws already stay on for {shortest:.3f} "
                "tokens, so each must be at least that."
            )

    @property
    def groups(self) -> list[float]:
        """The autocorrelation of each group."""
        return list(self.rho) or [rho_for(dwell, self.pi) for dwell in self.dwell]

    @property
    def k(self) -> int:
        """Active features that autoencoders aim at: those observed at a token, in the mean."""
        return max(1, min(round(self.features * self.pi * self.emission), self.d_sae))

    def source(self, seed: int) -> Source:
        """The stream of activations; ``seed`` of the directions."""
        each = self.features // len(self.groups)
        chain = Chain.of(self.pi, [rho for rho in self.groups for _ in range(each)], self.emission)
        return Source(chain, self.width, self.segment, seed)


PUBLISHED = Setting(
    features=40,
    width=80,
    rho=(0.1, 0.4, 0.7, 0.95),
    pi=0.15,
    d_sae=80,
    steps=600,
    lr=3e-3,
    l1=0.1,
    eval_length=256,
)
MIXED = Setting()
SETTINGS = {
    "published": PUBLISHED,
    "mixed": MIXED,
    **{
        f"dwell-{dwell}": replace(MIXED, dwell=(float(dwell),), features=512, d_sae=512, pi=0.025)
        for dwell in (2, 8, 32, 128)
    },
}


def quick(setting: Setting) -> Setting:
    """A small version that ends in seconds, to see that everything works; its figures mean little."""
    groups = len(setting.groups)
    return replace(
        setting,
        features=8 * groups,
        d_sae=16 * groups,
        width=16 * groups,
        pi=0.15,
        steps=60,
        batch=8,
        length=36,
        eval_length=64,
        eval_sequences=16,
    )
