"""Random calls of `activate_with_stats` for every backend, and their expected results.

The expected results come from the definition over pairs in float64, and the tolerances from the same computation in
PyTorch in the backend's precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from kernels_oracle import random_segments
from torch import Tensor

ACTIVATIONS = ("relu", "gelu", "identity", "threshold", "schmitt")
LAYOUTS = ("contiguous", "time first", "features first", "between others", "every other position")
OUTPUTS = ("h", "differences", "total", "square")
IDS = (torch.int64, torch.int32, torch.int16, torch.int8)


def arranged(x: Tensor, layout: str) -> Tensor:
    """x [B, T, k] with the strides of a layout; the memory between its elements is NaN."""
    if layout == "time first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "features first":
        return x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    if layout == "between others":
        return F.pad(x, (1, 2), value=float("nan"))[..., 1:-2]
    if layout == "every other position":
        return torch.stack([x, torch.full_like(x, float("nan"))], 2).flatten(1, 2)[:, ::2]
    return x.contiguous()


@dataclass
class Case:
    """The arguments of one call and the incoming gradients, on the CPU."""

    pre: Tensor  # [B, T, k]
    bias: Tensor | None  # [k]
    activation: str
    threshold: float | Tensor | None
    release: float | Tensor | None
    bands: tuple[tuple[int, int], ...]
    segments: Tensor | None  # [B, T]
    layout: str
    grad_layout: str
    used: tuple[str, ...]  # the outputs that the loss uses
    grads: dict[str, Tensor]  # of every output
    wanted: tuple[str, ...]  # "pre", "bias": what requires a gradient

    @property
    def compute(self) -> torch.dtype:
        return torch.float64 if self.pre.dtype == torch.float64 else torch.float32

    def run(self, function: Any, backend: str, device: str) -> dict[str, Tensor]:
        """Every output, and the gradients as "grad of pre" and "grad of bias"."""

        def moved(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor) else x

        leaves = {"pre": arranged(moved(self.pre), self.layout), "bias": moved(self.bias)}
        for name in self.wanted:
            leaves[name] = leaves[name].detach().requires_grad_()
        arguments = (moved(x) for x in (self.threshold, self.release, self.bands, self.segments))
        h, stats = function(leaves["pre"], leaves["bias"], self.name, *arguments, backend=backend)
        outputs = dict(zip(OUTPUTS, (h, *stats), strict=True))
        grads = [
            arranged(moved(g), self.grad_layout) if name == "h" else moved(g)
            for name, g in self.grads.items()
            if name in self.used
        ]
        found = torch.autograd.grad([outputs[n] for n in self.used], [leaves[n] for n in self.wanted], grads)
        outputs |= {f"grad of {name}": grad for name, grad in zip(self.wanted, found, strict=True)}
        return {name: x.detach().cpu() for name, x in outputs.items()}

    @property
    def name(self) -> str:
        return "relu" if self.activation in ("threshold", "schmitt") else self.activation

    # ---- expected results ----

    def argument(self) -> Tensor:
        """z = pre + bias in the precision in which every backend compares it with thresholds."""
        z = self.pre.to(self.compute)
        return z if self.bias is None else z + self.bias.to(self.compute)

    def on(self) -> Tensor:
        """[B, T, k] bool: which features are on."""
        z = self.argument()
        if self.name != "relu":
            return torch.ones_like(z, dtype=torch.bool)
        zero = torch.zeros_like(z)
        level = zero if self.threshold is None else (zero + self.threshold).clamp_min(0)
        on = z > level
        if self.release is not None:
            same = self.connected().diagonal(1, 1, 2)  # [B, T - 1]
            above = z > (zero + self.release)
            for t in range(1, z.shape[1]):
                on[:, t] |= on[:, t - 1] & above[:, t] & same[:, t - 1, None]
        return on

    def connected(self) -> Tensor:
        """[B, T, T] bool: t and u are in one segment."""
        B, T, _ = self.pre.shape
        if self.segments is None:
            return torch.ones(B, T, T, dtype=torch.bool)
        ids = self.segments.long()
        run = (ids[:, 1:] != ids[:, :-1]).cumsum(1)
        run = torch.cat([torch.zeros(B, 1, dtype=run.dtype), run], 1)
        return (run[:, :, None] == run[:, None]) & (ids >= 0)[:, None]

    def pairs(self, first: int, last: int) -> Tensor:
        """[B, T, T] bool, symmetric: pairs in one segment with offsets from first to last."""
        t = torch.arange(self.pre.shape[1])
        offset = (t[:, None] - t).abs()
        return self.connected() & (offset >= first) & (offset <= last)

    def included(self, h: Tensor) -> Tensor:
        """[B, T, 1]: 1 where not excluded, else 0."""
        return self.connected().diagonal(0, 1, 2)[..., None].to(h.dtype)

    def centred(self, h: Tensor) -> Tensor:
        """h minus the mean of each position's segment, which leaves differences unchanged; 0 where excluded."""
        weights = self.connected().to(h.dtype)
        mean = (weights @ h.detach()) / weights.sum(2, keepdim=True).clamp_min(1)
        return (h - mean) * self.included(h)

    def stats(self, h: Tensor, *, in_matrices: bool) -> dict[str, Tensor]:
        """The statistics of h in h's precision, pair by pair or as products with each band's matrix."""
        differences = []
        for band in self.bands:
            mask = self.pairs(*band).to(h.dtype)
            if in_matrices:
                y = self.centred(h)
                differences.append((y * (mask.sum(2, keepdim=True) * y - mask @ y)).sum(1))
            else:
                steps = h[:, :, None] - h[:, None]  # [B, T, T, k]
                differences.append(0.5 * (mask[..., None] * steps.square()).sum((1, 2)))
        x = h * self.included(h)
        B, _, k = h.shape
        stacked = torch.stack(differences, 1) if differences else h.new_zeros(B, 0, k)
        return {"differences": stacked, "total": x.sum(1), "square": x.square().sum(1)}

    def expected(self, h: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """The expected results of `run` given its h: by definition in float64, else with matrix products."""
        z = self.argument().to(dtype)
        value = z * self.on() if self.name != "gelu" else F.gelu(z)
        leaf = h.to(dtype).requires_grad_()
        out = {"h": value, **self.stats(leaf, in_matrices=dtype != torch.float64)}
        loss = sum((out[name] * self.grads[name].to(dtype)).sum() for name in self.used if name != "h")
        grad = torch.zeros_like(leaf)
        if isinstance(loss, Tensor) and loss.requires_grad:
            (grad,) = torch.autograd.grad(loss, leaf)
        if "h" in self.used:
            grad = grad + self.grads["h"].to(dtype)
        if self.name == "gelu":
            z.requires_grad_()
            (slope,) = torch.autograd.grad(F.gelu(z).sum(), z)
            grad = grad * slope
        else:
            grad = grad * self.on()
        out |= {"grad of pre": grad, "grad of bias": grad.sum((0, 1))}
        return {name: x.detach() for name, x in out.items()}

    def sizes(self, h: Tensor) -> dict[str, float]:
        """The largest sum of absolute terms of each result, which rounding errors are proportional to.

        A band's gradient is the difference of two windows.
        """
        h = h.double()
        x, y = (h * self.included(h)).abs(), self.centred(h).abs()

        def pull(first: int, last: int) -> Tensor:
            mask = self.pairs(first, last).double()
            return mask.sum(2, keepdim=True) * y + mask @ y

        grad = torch.zeros_like(x)
        if "differences" in self.used:
            coefficients = self.grads["differences"].double().abs().unbind(1)
            for c, (first, last) in zip(coefficients, self.bands, strict=True):
                grad += 2 * c[:, None] * (pull(0, first - 1) + pull(0, last))
        if "total" in self.used:
            grad += self.grads["total"].double().abs()[:, None]
        if "square" in self.used:
            grad += 2 * self.grads["square"].double().abs()[:, None] * x
        if "h" in self.used:
            grad += self.grads["h"].double().abs()
        terms = {
            "h": self.argument().double(),
            "differences": torch.stack([(y * pull(*band)).sum(1) for band in self.bands]) if self.bands else x[:0],
            "total": x.sum(1),
            "square": x.square().sum(1),
            "grad of pre": grad,
            "grad of bias": grad.sum((0, 1)),
        }
        return {name: value.abs().max().item() if value.numel() else 0.0 for name, value in terms.items()}


@st.composite
def cases(
    draw: Any, longest: int = 48, widest: int = 40, dtypes: tuple[torch.dtype, ...] = (), only_bands: Any = None
) -> Case:
    """One call: shape, strides, dtype, bands, segments, activation, thresholds, and the gradients to compute."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    B, T, k = draw(st.integers(1, 3)), draw(st.integers(1, longest)), draw(st.integers(1, widest))
    dtype = draw(st.sampled_from(dtypes or (torch.float32, torch.bfloat16, torch.float16, torch.float64)))
    edges = sorted(draw(st.sets(st.integers(1, longest + 9), max_size=16)))[: draw(st.integers(0, 8)) * 2]
    bands = tuple(zip(edges[::2], edges[1::2], strict=False))
    if draw(st.integers(0, 3)) == 0:
        bands = ((1, 3), (4, 15), (16, 127))
    bands = only_bands or bands
    segments = None
    if draw(st.booleans()):
        segments = random_segments(B, T, generator, longest=12).to(draw(st.sampled_from(IDS)))

    pre = normal(B, T, k)
    kind = draw(st.sampled_from(("noise", "noise", "far from zero", "walk")))
    if kind == "walk":
        pre = pre.cumsum(1)
    if kind == "far from zero":
        pre = pre + (1e3 if dtype in (torch.float32, torch.float64) else 30)
    activation = draw(st.sampled_from(ACTIVATIONS))
    threshold = release = None
    if activation in ("threshold", "schmitt"):
        threshold = _level(draw, normal, (0.3, (), (k,), (B, T, 1)))
    if activation == "schmitt":
        if isinstance(threshold, Tensor):
            threshold = threshold.abs()
        release = _level(draw, normal, (0.1, (), (k,)))
        release = release.abs() * 0.3 if isinstance(release, Tensor) else release
        threshold = threshold + (release if isinstance(release, float) else release.max().item())
    bias = normal(k) if draw(st.booleans()) else None

    grads = {"h": normal(B, T, k).to(dtype)}
    shared = draw(st.booleans())
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    coefficients = normal(1 if shared else B, len(bands), k).to(compute)
    coefficients[..., torch.rand(k, generator=generator) < 0.3] = 0  # as a variance mask makes them
    grads["differences"] = coefficients.expand(B, len(bands), k)
    grads |= {"total": normal(B, k).to(compute), "square": normal(B, k).to(compute)}
    used = draw(st.lists(st.sampled_from(OUTPUTS), min_size=1, unique=True))
    wanted = ("pre",) if bias is None else draw(st.sampled_from((("pre",), ("bias",), ("pre", "bias"))))
    return Case(
        pre.to(dtype),
        bias,
        activation,
        threshold,
        release,
        bands,
        segments,
        draw(st.sampled_from(LAYOUTS)),
        draw(st.sampled_from(LAYOUTS)),
        tuple(name for name in OUTPUTS if name in used),
        grads,
        wanted,
    )


def _level(draw: Any, normal: Any, forms: tuple[Any, ...]) -> float | Tensor:
    form = draw(st.sampled_from(forms))
    return form if isinstance(form, float) else 0.5 * normal(*form)
