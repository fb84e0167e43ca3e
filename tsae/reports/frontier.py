"""Bits at equal explained variance: methods compared where their frontiers of quality against bits meet.

A method is measured at two sizes or more (its L0). Between two of them its bits at a given quality, and its quality at
given bits, are interpolated; outside of them there is nothing, and the reason is said. docs/metrics.md has the rules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import mean
from typing import Any, NamedTuple

from tsae.evaluation.catalogue import lookup

SUPPORT, TOTAL = "temporal.support_bits", "temporal.total_bits"
EV, CE = "explained_variance", "ce_loss_score"
BASELINES = ("plain", "topk", "batchtopk", "jumprelu", "matryoshka", "matryoshka-batchtopk")
"""Methods without memory or temporal terms, by the names that sweeps give them."""

Runs = Iterable[tuple[str, Mapping[str, Any]]]
"""The name of each run, and the content of its eval.json."""


class RunName(NamedTuple):
    """The parts of a run's name, such as `hysteresis-0.4-k36-seed1`."""

    method: str
    """The name without size and seed: `hysteresis-0.4`."""
    size: str
    """`k36`; of a name without `-kN` the number at its end, as `3` of `contrastive-3`; "" if there is none."""
    seed: str
    """`1`; "" if there is none."""

    @property
    def configuration(self) -> str:
        """Method and size, a name whose parts are the same."""
        method, at, ratio = self.method.partition("@")
        return f"{method}-{self.size}{at}{ratio}" if self.size else self.method


def run_name(name: str) -> RunName:
    """The parts of a run's name.

    `-seedN` names the seed and `-kN` the size, wherever they stand; what remains is the method. If there is no `-kN`, a
    number at the end is the size, so that the weights of a term are one method. What follows an `@` (another release
    ratio at inference) belongs to the method.
    """
    name, at, ratio = name.partition("@")
    seed = re.search(r"-seed(\d+)(?=-|$)", name)
    if seed:
        name = name[: seed.start()] + name[seed.end() :]
    size = re.search(r"-(k\d+)(?=-|$)", name) or re.search(r"(?<=.)-(\d+(?:\.\d+)?)$", name)
    if size:
        name = name[: size.start()] + name[size.end() :]
    return RunName(name + at + ratio, size[1] if size else "", seed[1] if seed else "")


class Curve:
    """Quality against bits of one method and seed.

    Of the measured points those stay that no other one beats in both; between neighbours, log(1 - quality) is linear in
    log(bits). So errors follow a power of the bits, as an SAE's error follows a power of its L0. For neighbours whose
    bits differ by a factor r, linear in the bits would give up to (ln r)^2 / 8 more of them: 0.4 % at r = 1.2.

    points: (bits, quality), in any order; quality is below 1 and bits are above 0, others are left out
    """

    def __init__(self, points: Iterable[tuple[float, float]]) -> None:
        usable = [(bits, quality) for bits, quality in points if 0 < bits < math.inf and -math.inf < quality < 1]
        self.points: list[tuple[float, float]] = []
        """The frontier: bits and quality both rise."""
        for bits, quality in sorted(usable, key=lambda point: (point[0], -point[1])):
            if not self.points or quality > self.points[-1][1]:
                self.points.append((bits, quality))

    def bits_at(self, quality: float) -> float | None:
        """Bits at a quality; None outside of the measured qualities."""
        if not quality < 1:
            return None
        found = _interpolate([(math.log1p(-q), math.log(bits)) for bits, q in self.points], math.log1p(-quality))
        return None if found is None else math.exp(found)

    def quality_at(self, bits: float) -> float | None:
        """The quality at some bits; None outside of the measured bits."""
        if not bits > 0:
            return None
        found = _interpolate([(math.log(b), math.log1p(-quality)) for b, quality in self.points], math.log(bits))
        return None if found is None else -math.expm1(found)


def _interpolate(points: list[tuple[float, float]], x: float) -> float | None:
    """y at x on the straight lines between neighbours, which are in order of x; None outside of them."""
    slack = 1e-12 * max(1.0, abs(x))  # a measured point is inside
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if min(x0, x1) - slack <= x <= max(x0, x1) + slack:
            return y0 + (y1 - y0) * min(max((x - x0) / (x1 - x0), 0.0), 1.0)
    return points[0][1] if len(points) == 1 and abs(points[0][0] - x) <= slack else None


@dataclass(frozen=True)
class Estimate:
    """A value over seeds, or the reason why there is none."""

    value: float | None
    """The mean over seeds."""
    half_range: float = 0.0
    """Half the range over seeds."""
    seeds: int = 0
    why: str = ""
    """A sentence, if value is None."""

    @classmethod
    def of(cls, values: list[float]) -> Estimate:
        """The mean of the seeds' values, at least one."""
        return cls(mean(values), (max(values) - min(values)) / 2, len(values))


@dataclass(frozen=True)
class Relative:
    """A configuration against the best baseline at the same quality."""

    quality: Estimate
    bits: Estimate
    baseline: str
    """The baseline with the fewest bits at this quality; "" if none was measured there."""
    difference: Estimate
    """Share of the baseline's bits: -0.1 is 10 % fewer."""
    notes: list[str] = field(default_factory=list)
    """Which baselines could not be interpolated, and why."""


class Frontier:
    """Runs of several methods at several sizes and seeds.

    runs:    names, as `run_name` reads them, and metrics; runs without the two metrics are left out
    bits:    the key of the cost in eval.json
    quality: the key of what it buys, at most 1
    """

    def __init__(self, runs: Runs, bits: str = TOTAL, quality: str = EV) -> None:
        self.configurations: dict[str, list[tuple[float, float]]] = {}
        """(bits, quality) of each seed, by method and size."""
        self._seeds: dict[str, list[str]] = {}  # of these, in the same order
        points: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for name, metrics in runs:
            cost, worth = lookup(dict(metrics), bits), lookup(dict(metrics), quality)
            if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in (cost, worth)):
                continue
            parts = run_name(name)
            self.configurations.setdefault(parts.configuration, []).append((cost, worth))
            self._seeds.setdefault(parts.configuration, []).append(parts.seed)
            points.setdefault(parts.method, {}).setdefault(parts.seed, []).append((cost, worth))
        self.methods = {method: {seed: Curve(each) for seed, each in seeds.items()} for method, seeds in points.items()}
        """The curve of each seed, by method."""

    def bits_at(self, method: str, quality: float) -> Estimate:
        """A method's bits at a quality: the mean over its seeds, each interpolated by itself."""
        return self._at(method, quality, "bits_at", 1, f"{quality:.4f}")

    def quality_at(self, method: str, bits: float) -> Estimate:
        """A method's quality at some bits: the mean over its seeds, each interpolated by itself."""
        return self._at(method, bits, "quality_at", 0, f"{bits:.1f} bits")

    def _at(self, method: str, x: float, function: str, axis: int, shown: str) -> Estimate:
        if method not in self.methods:
            return Estimate(None, why=f"{method} was not measured")
        values = []
        for seed, curve in self.methods[method].items():
            value = getattr(curve, function)(x)
            if value is None:
                measured = [point[axis] for point in curve.points]
                of = f", seed {seed}," if seed else ""
                form = "{:.4f}" if axis else "{:.1f}"
                ranged = f"{form.format(min(measured))} to {form.format(max(measured))}" if measured else "nothing"
                why = f"{method}{of} was measured at {ranged}, which {shown} lies outside of"
                return Estimate(None, why=why)
            values.append(value)
        return Estimate.of(values)

    def best(self, methods: Iterable[str], quality: float) -> tuple[str, Estimate, list[str]]:
        """The method with the fewest bits at a quality, its bits, and why others have none there.

        If one that was not measured there takes fewer bits at a higher quality, no one is known to be the best.
        """
        name, least, notes = "", Estimate(None, why="no method was measured there"), []
        outside = []
        for method in methods:
            if method not in self.methods:
                continue
            found = self.bits_at(method, quality)
            if found.value is None:
                notes.append(found.why)
                outside.append(method)
            elif least.value is None or found.value < least.value:
                name, least = method, found
        for method in outside:
            if least.value is not None and self._beats(method, least.value, quality):
                why = f"{method} takes fewer bits than {name} at a higher quality, but was not measured there"
                return "", Estimate(None, why=why), notes
        return name, least, notes

    def _beats(self, method: str, bits: float, quality: float) -> bool:
        """Whether a configuration of a method has more of the quality with fewer bits, in the mean over seeds."""
        return any(
            mean(point[0] for point in points) < bits and mean(point[1] for point in points) > quality
            for configuration, points in self.configurations.items()
            if run_name(configuration).method == method
        )

    def relative(self, configuration: str, baselines: Iterable[str] = BASELINES) -> Relative:
        """A configuration, where it was measured, against the best of the baselines there.

        Nothing is interpolated but the baselines: each seed's bits are divided by those of the best baseline at the
        quality of that seed, with the same seed if the baseline has it there, else in the mean over the baseline's
        seeds. The best is the one at the mean quality.
        """
        points, seeds = self.configurations[configuration], self._seeds[configuration]
        quality, bits = Estimate.of([point[1] for point in points]), Estimate.of([point[0] for point in points])
        name, least, notes = self.best(baselines, mean(point[1] for point in points))
        if least.value is None:
            return Relative(quality, bits, "", least, notes)
        shares = []
        for (cost, worth), seed in zip(points, seeds, strict=True):
            paired = self.methods[name][seed].bits_at(worth) if seed in self.methods[name] else None
            reference = self.bits_at(name, worth) if paired is None else Estimate.of([paired])
            if reference.value is None:
                return Relative(quality, bits, name, reference, notes)
            shares.append(cost / reference.value - 1)
        return Relative(quality, bits, name, Estimate.of(shares), notes)


def difference_at_equal(runs: Runs, configuration: str, baseline: str, key: str = CE, quality: str = EV) -> Estimate:
    """How much more a configuration has of a metric than a baseline at the same quality, in the metric's units.

    The baseline's metric is linear in the quality between its sizes, for each of its seeds by itself; outside of them
    there is none. A seed is compared with the baseline's same seed, or else with the mean over its seeds.

    key, quality: keys of eval.json
    """
    points: list[tuple[float, float, str]] = []
    curves: dict[str, list[tuple[float, float]]] = {}
    for name, metrics in runs:
        at, value = (lookup(dict(metrics), each) for each in (quality, key))
        if not all(isinstance(each, (int, float)) and math.isfinite(each) for each in (at, value)):
            continue
        parts = run_name(name)
        if parts.configuration == configuration:
            points.append((at, value, parts.seed))
        if parts.method == baseline:
            curves.setdefault(parts.seed, []).append((at, value))
    differences = []
    for at, value, seed in points:
        others = {each: _interpolate(sorted(curve), at) for each, curve in curves.items()}
        found = [other for other in others.values() if other is not None]
        if (paired := others.get(seed)) is not None:
            found = [paired]
        elif not found or len(found) < len(others):
            return Estimate(None, why=f"{baseline} was not measured at {at:.4f} with every seed")
        differences.append(value - mean(found))
    return Estimate.of(differences) if differences else Estimate(None, why=f"{configuration} was not measured")
