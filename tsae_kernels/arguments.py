"""Argument checks. Each error names the argument, the value it got and the value it wants."""

from __future__ import annotations

import torch
from torch import Tensor

from tsae_kernels.dtypes import DTYPES, dtype_of_stats

ACTIVATIONS = ("relu", "gelu", "identity")
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def check_features(name: str, value: Tensor) -> None:
    """Require a [B, T, k] tensor of a supported dtype with T, k >= 1."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a [B, T, k] tensor, got {_describe(value)}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {_describe(value)}")
    if value.dim() != 3 or value.shape[1] < 1 or value.shape[2] < 1:
        raise ValueError(f"{name} must be [B, T, k] with T and k at least 1, got {_describe(value)}")


def check_tensor(name: str, value: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Require a floating-point tensor of `shape` on `device`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {list(shape)}, got {_describe(value)}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be a floating-point tensor, got {_describe(value)}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {_describe(value)}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device} like the features, got {_describe(value)}")


def check_weight(weight: Tensor, x: Tensor) -> None:
    """Require an encoder's weight [d, k] for x [B, T, d], in x's dtype unless autocast is on."""
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[0] != x.shape[2]:
        shape = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"weight must be a tensor of shape [d, k] with d = {x.shape[2]}, got {shape}")
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"weight must be {x.dtype} like x (or use autocast), got {weight.dtype}")
    check_tensor("weight", weight, tuple(weight.shape), x.device)


def check_segments(segments: Tensor | None, like: Tensor) -> None:
    """Require None or integer ids [B, T] on the features' device."""
    if segments is None:
        return
    shape = list(like.shape[:2])
    if not isinstance(segments, Tensor) or segments.dtype not in _INTEGERS:
        raise TypeError(f"segments must be None or an integer tensor of shape {shape}, got {_describe(segments)}")
    if list(segments.shape) != shape:
        raise ValueError(f"segments must have shape {shape} ([B, T]), got {_describe(segments)}")
    if segments.device != like.device:
        raise ValueError(f"segments must be on {like.device} like the features, got {_describe(segments)}")


def check_activation(
    pre: Tensor, activation: str, threshold: float | Tensor | None, release: float | Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Check the activation and return `threshold` and `release` as tensors."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    if threshold is not None and activation != "relu":
        raise ValueError(f"threshold must be None with activation={activation!r}; it applies to 'relu' only")
    if release is not None and threshold is None:
        raise ValueError("release must be None without a threshold")
    B, T, k = pre.shape
    tensors = (
        _as_tensor("threshold", threshold, pre, {"[]": (), "[k]": (k,), "[B, T, 1]": (B, T, 1)}),
        _as_tensor("release", release, pre, {"[]": (), "[k]": (k,)}),
    )
    if threshold is not None and release is not None:
        _check_release(threshold, release)
    return tensors


def _as_tensor(
    name: str, value: float | Tensor | None, pre: Tensor, shapes: dict[str, tuple[int, ...]]
) -> Tensor | None:
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if value != value:
            raise ValueError(f"{name} must be a number, got {value!r}")
        return torch.full((), float(value), dtype=dtype_of_stats(pre.dtype), device=pre.device)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number or a tensor, got {_describe(value)}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be a floating-point tensor, got {_describe(value)}")
    if tuple(value.shape) not in shapes.values():
        features = f"features of shape {list(pre.shape)}"
        raise ValueError(
            f"{name} must be a number or a {' or '.join(shapes)} tensor for {features}, got {_describe(value)}"
        )
    if value.device != pre.device:
        raise ValueError(f"{name} must be on {pre.device} like pre, got {_describe(value)}")
    return value.detach()


def _check_release(threshold: float | Tensor, release: float | Tensor) -> None:
    """Require 0 <= release <= threshold, as far as that can be checked without waiting for a device.

    A per-position threshold is exempt, because a TopK threshold can be negative; the lower of the two then applies.
    """
    wanted = "release must satisfy 0 <= release <= threshold"
    if not isinstance(release, Tensor):
        if release < 0:
            raise ValueError(f"{wanted}, got release={release!r}")
        if not isinstance(threshold, Tensor) and release > threshold:
            raise ValueError(f"{wanted}, got release={release!r} and threshold={threshold!r}")
    tensors = [value for value in (threshold, release) if isinstance(value, Tensor)]
    if torch.compiler.is_compiling() or not tensors or any(t.device.type != "cpu" for t in tensors):
        return
    if isinstance(release, Tensor) and bool((release < 0).any()):
        raise ValueError(f"{wanted}, got a release of {release.min().item()}")
    per_position = isinstance(threshold, Tensor) and threshold.dim() == 3
    if not per_position and bool((torch.as_tensor(release) > torch.as_tensor(threshold)).any()):
        raise ValueError(f"{wanted}, got release={_extremes(release)} and threshold={_extremes(threshold)}")


def _extremes(value: float | Tensor) -> str:
    if isinstance(value, Tensor) and value.numel() > 1:
        return f"{value.min().item()} to {value.max().item()}"
    return str(float(value))
