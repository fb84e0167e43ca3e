"""Scores of trained autoencoders, of what is read from their features, and of the ceilings, on the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tsae.evaluation.metrics.bits import CodeLength
from tsae.evaluation.metrics.reconstruction import ReconstructionMetrics
from tsae.synthetic.chains import Chain, Source, Truth
from tsae.synthetic.codes import code_of, directions_of
from tsae.synthetic.estimate import fit_chain
from tsae.synthetic.methods import READOUTS, Method
from tsae.synthetic.scores import StateScores, match, summary
from tsae.synthetic.settings import Setting

CEILING = "truth"  # the name of the true amplitudes among the methods
FEATURES = "features"  # of the features themselves among the read-outs
_ROWS = 8  # sequences at a time
_SMALLEST = 1e-6  # what a feature that is held on is worth at least, so that it counts as on


class _Reader:
    """One autoencoder, or with ``sae`` None the true amplitudes, and the scores of all its read-outs."""

    def __init__(
        self, sae: Any | None, chain: Chain, index: Tensor | None, readouts: Iterable[str], *, causal: bool = True
    ) -> None:
        self.sae, self.chain, self.index, self.causal = sae, chain, index, causal
        self.scores = {FEATURES: StateScores()} | {name: StateScores(READOUTS[name].above) for name in readouts}
        self.reconstruction = ReconstructionMetrics()
        self.bits = {name: CodeLength() for name in self.scores if name == FEATURES or READOUTS[name].support}
        self.active, self.coded, self.on = (dict.fromkeys(self.bits, 0.0) for _ in range(3))
        if sae is not None:
            self.code, self.norms = code_of(sae)

    def update(self, truth: Truth, half: int) -> None:
        h = truth.amplitude if self.sae is None else self.sae.encode(truth.x, truth.segments)
        if self.sae is not None:
            self.reconstruction.update(truth.x, self.sae.decode(h), h, truth.segments)
        for name, scores in self.scores.items():
            values = h if name == FEATURES else READOUTS[name].read(h, truth.segments, self.chain)
            if self.sae is not None and name in self.bits:
                held = h if name == FEATURES else values * h.clamp(min=_SMALLEST)
                code = self.code(truth.x, h, truth.segments) if name == FEATURES else (held, truth.segments)
                self._charge(name, *code, half)
                self.on[name] += float((held > 0).sum())
            scores.update(values if self.index is None else values[..., self.index], truth.hidden, truth.amplitude > 0)

    def _charge(self, name: str, code: Tensor, segments: Tensor, half: int) -> None:
        self.bits[name].update(code, segments, half)
        self.coded[name] += float((segments >= 0).sum())
        self.active[name] += float((code[segments >= 0] > 0).sum())

    def result(self, groups: list[Tensor], ceilings: dict[bool, StateScores]) -> dict[str, Any]:
        """``groups``: masks [n] of features; ``ceilings``: of causal read-outs (True) and others."""
        rows: dict[str, Any] = {}
        for name, scores in self.scores.items():
            causal = self.causal and (name == FEATURES or READOUTS[name].causal)
            parts = [summary(scores, which, ceilings[causal]) for which in (*groups, torch.stack(groups).any(0))]
            rows[name] = {"causal": causal, "groups": parts[:-1], "all": parts[-1]}
        if self.sae is None:
            return {"rows": rows}
        metrics = self.reconstruction.compute()
        tokens = self.reconstruction.tokens
        for name, bits in self.bits.items():
            found = bits.compute(self.reconstruction.rms_error(), self.norms)  # per position of the code
            rows[name] |= {key: value * self.coded[name] / tokens for key, value in found.items()}
            rows[name] |= {"l0": self.active[name] / tokens, "on": self.on[name] / tokens}
        kept = ("explained_variance", "frac_alive")
        return {"rows": rows} | {key: metrics[key] for key in kept}


@torch.no_grad()
def measure(
    saes: dict[str, nn.Module],
    methods: dict[str, Method],
    setting: Setting,
    source: Source,
    seed: int,
    advance: Callable[[float], None],
) -> dict[str, Any]:
    """What the results file says of a setting's methods.

    saes, methods: by name, the same names; from `train`
    seed: of the tokens; rates are estimated on others
    advance: called with the tokens of each batch that was scored
    out: by method, and under `CEILING` for the true amplitudes with the true rates: `rows` by read-out, with the scores
        of each group of features and of all; for autoencoders the explained variance, L0, bits, the matching
    """
    count = -(-setting.eval_sequences // _ROWS)
    batches = (count, min(_ROWS, setting.eval_sequences), setting.eval_length)
    readers = {CEILING: _Reader(None, source.chain, None, READOUTS)}
    matched = {}
    for name, sae in saes.items():
        feature, cosine = match(directions_of(sae), source.directions)
        matched[name] = {"mcc": float(cosine.mean()), "found": float((cosine > 0.9).double().mean())}
        needed = bool(methods[name].readouts)
        chain = _estimated(sae, source.batches(*batches, seed + 1)) if needed else source.chain
        readers[name] = _Reader(sae, chain, feature, methods[name].readouts, causal=methods[name].causal)
    for done, truth in enumerate(source.batches(*batches, seed)):
        for reader in readers.values():
            reader.update(truth, int(2 * done >= count))
        advance(truth.segments.numel())
    each = source.features // len(setting.groups)
    groups = [torch.arange(source.features) // each == group for group in range(len(setting.groups))]
    ceilings = {READOUTS[name].causal: readers[CEILING].scores[name] for name in ("filter", "smoother")}
    return {name: reader.result(groups, ceilings) | matched.get(name, {}) for name, reader in readers.items()}


def _estimated(sae: Any, batches: Iterable[Truth]) -> Chain:
    """The chains of an autoencoder's features, from its features alone."""
    parts = [(sae.encode(truth.x, truth.segments) > 0, truth.segments) for truth in batches]
    observed, segments = (torch.cat(each) for each in zip(*parts, strict=True))
    return fit_chain(observed, segments)
