"""`python -m tsae.synthetic`: a benchmark over time with known features and known ceilings."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from tsae.utils.cli import parse, report_errors


@dataclass
class Arguments:
    """Train autoencoders on made-up activations whose features follow hidden two-state chains, and score how well what
    is read from them follows the hidden states, beside the Bayes filter and smoother. Writes synthetic.json,
    synthetic.md and synthetic.png."""

    settings: tuple[str, ...] = ("published", "mixed")
    """Settings: `published` (40 features, d = 80), `mixed` (2,048 features, d = 256, dwell times 2, 8, 32 and 128
    tokens), `dwell-2`, `dwell-8`, `dwell-32`, `dwell-128` (512 features of one dwell time)."""
    methods: tuple[str, ...] = ("relu", "topk", "batchtopk", "jumprelu", "schmitt")
    """Autoencoders: `relu`, `topk`, `batchtopk`, `jumprelu`, `schmitt`, `rate`, `plain` (one threshold), `matryoshka`;
    `t-sae`, `tsae`, `tc-sae` with a temporal term; `persistent`, `running-means`, `crosscoder-4`, `crosscoder-12`,
    which read more than one token (docs/synthetic.md)."""
    steps: int | None = None
    """Optimizer steps. Default: the setting's."""
    seed: int = 0
    """Seed of everything random."""
    quick: bool = False
    """A few small features and steps, in seconds, to see that everything works; the figures mean little."""
    out: Path | None = None
    """Directory. Default: runs/synthetic/TIMESTAMP."""
    overwrite: bool = False
    """Replace the results in --out."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for bad input."""
    with report_errors() as status:
        asked = parse(Arguments, sys.argv[1:] if argv is None else argv, None, "python -m tsae.synthetic")
        from tsae.synthetic.command import run  # after parsing, so that --help is fast

        run(
            asked.settings,
            asked.methods,
            steps=asked.steps,
            seed=asked.seed,
            small=asked.quick,
            out=asked.out,
            overwrite=asked.overwrite,
        )
    return status.code


if __name__ == "__main__":
    sys.exit(main())
