"""Errors name the argument, its value and what it should be; backends are selected as documented."""

import subprocess
import sys

import pytest
import torch

import tsae_kernels as tk

H = torch.randn(2, 6, 3)
STATS, ACTIVATE, ENCODE = tk.temporal_stats, tk.activate_with_stats, tk.encode_with_stats
LOSS, WINDOW = tk.temporal_loss, tk.window_consistency


@pytest.mark.parametrize(
    ("function", "arguments", "error", "words"),
    [
        (STATS, {"h": [1.0]}, TypeError, ["h must be", "list"]),
        (STATS, {"h": torch.ones(2, 6, 3, dtype=torch.int64)}, TypeError, ["h must be float64", "int64"]),
        (STATS, {"h": torch.ones(6, 3)}, ValueError, ["h must be", "[6, 3]"]),
        (STATS, {"h": torch.ones(2, 0, 3)}, ValueError, ["h must be", "[2, 0, 3]"]),
        (STATS, {"bands": 3}, TypeError, ["bands must be", "int"]),
        (STATS, {"bands": ((1, 2, 3),)}, ValueError, ["bands must be", "(1, 2, 3)"]),
        (STATS, {"bands": ((0, 2),)}, ValueError, ["bands must have 1 <=", "(0, 2)"]),
        (STATS, {"bands": ((3, 2),)}, ValueError, ["bands must have", "(3, 2)"]),
        (STATS, {"bands": ((1, 3), (3, 5))}, ValueError, ["disjoint and ascending"]),
        (STATS, {"bands": ((4, 5), (1, 3))}, ValueError, ["disjoint and ascending"]),
        (STATS, {"bands": ((1.0, 3),)}, TypeError, ["integer offsets", "1.0"]),
        (STATS, {"segments": torch.zeros(2, 6)}, TypeError, ["segments must be", "float32"]),
        (STATS, {"segments": torch.zeros(6, dtype=torch.int64)}, ValueError, ["segments must have shape [2, 6]"]),
        (STATS, {"backend": "fast"}, ValueError, ["backend must be one of", "'fast'", "'eager'"]),
        (STATS, {"backend": 3}, TypeError, ["backend must be", "3"]),
        (ACTIVATE, {"bias": torch.zeros(4)}, ValueError, ["bias must have shape [3]", "[4]"]),
        (ACTIVATE, {"bias": 0.5}, TypeError, ["bias must be a tensor", "0.5"]),
        (ACTIVATE, {"activation": "tanh"}, ValueError, ["activation must be one of", "'tanh'"]),
        (ACTIVATE, {"activation": "gelu", "threshold": 0.1}, ValueError, ["threshold must be None", "'gelu'"]),
        (ACTIVATE, {"threshold": "high"}, TypeError, ["threshold must be a number or a tensor", "'high'"]),
        (ACTIVATE, {"threshold": torch.zeros(4)}, ValueError, ["threshold must be", "[B, T, 1]", "[2, 6, 3]", "[4]"]),
        (ACTIVATE, {"threshold": torch.zeros(3).long()}, TypeError, ["threshold must be a floating-point", "int64"]),
        (ACTIVATE, {"threshold": float("nan")}, ValueError, ["threshold must be a number", "nan"]),
        (ACTIVATE, {"release": 0.1}, ValueError, ["release must be None without a threshold"]),
        (ACTIVATE, {"threshold": 0.1, "release": 0.2}, ValueError, ["0 <= release <= threshold", "0.2", "0.1"]),
        (ACTIVATE, {"threshold": 0.1, "release": -0.2}, ValueError, ["0 <= release <= threshold", "-0.2"]),
        (ACTIVATE, {"threshold": torch.tensor([0.5, 0.1, 0.5]), "release": 0.2}, ValueError, ["release=0.2"]),
        (ACTIVATE, {"threshold": 0.5, "release": torch.tensor([-1.0, 0.1, 0.1])}, ValueError, ["-1.0"]),
        (ACTIVATE, {"threshold": 0.5, "release": torch.zeros(2, 6, 1)}, ValueError, ["release must be", "[k]"]),
        (ENCODE, {"weight": torch.zeros(4, 5)}, ValueError, ["weight must be", "d = 3", "[4, 5]"]),
        (ENCODE, {"weight": torch.zeros(3, 5).double()}, TypeError, ["weight must be", "float64"]),
        (LOSS, {"weights": (1.0,)}, ValueError, ["weights must have one number per band: 3", "1"]),
        (LOSS, {"weights": 0.5}, TypeError, ["weights must be a sequence", "float"]),
        (LOSS, {"variance": torch.ones(4)}, ValueError, ["variance must have shape [3]"]),
        (LOSS, {"min_variance": "low"}, TypeError, ["min_variance must be a number", "str"]),
        (WINDOW, {"window": 1}, ValueError, ["window must be at least 2", "1"]),
        (WINDOW, {"window": 2.5}, TypeError, ["window must be an integer", "2.5"]),
    ],
)
def test_bad_arguments(function, arguments, error, words):
    features = () if "h" in arguments else (H,)
    with pytest.raises(error) as raised:
        function(*features, **arguments)
    for word in words:
        assert word in str(raised.value)


def test_table_of_backends():
    table = tk.available_backends()
    assert set(table) == {"reference", "eager", "cpp", "triton", "cuda"}
    assert table["reference"] == table["eager"] == "ok"
    assert all(isinstance(state, str) and state for state in table.values())


def test_an_unavailable_backend_fails_with_the_reason_and_the_remedy(monkeypatch):
    missing = [name for name, state in tk.available_backends().items() if state != "ok"]
    for name in missing:
        with pytest.raises(RuntimeError) as raised:
            tk.temporal_stats(H, backend=name)
        assert tk.available_backends()[name] in str(raised.value)
        assert "backend='eager'" in str(raised.value)
        monkeypatch.setenv("TSAE_BACKEND", name)
        with pytest.raises(RuntimeError, match="unset TSAE_BACKEND"):
            tk.window_consistency(H)
        monkeypatch.delenv("TSAE_BACKEND")


def test_the_argument_overrides_the_environment_variable(monkeypatch):
    from tsae_kernels.backends import eager, reference

    called = []
    for module in (eager, reference):
        original = module.temporal_stats
        monkeypatch.setattr(
            module,
            "temporal_stats",
            lambda *a, original=original, name=module.__name__: called.append(name) or original(*a),
        )
    monkeypatch.delenv("TSAE_BACKEND", raising=False)
    monkeypatch.setenv("TSAE_BACKEND", "reference")
    tk.temporal_stats(H)
    tk.temporal_stats(H, backend="eager")
    assert called == ["tsae_kernels.backends.reference", "tsae_kernels.backends.eager"]
    monkeypatch.setenv("TSAE_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="TSAE_BACKEND must be one of"):
        tk.temporal_stats(H)


def test_command_line_prints_the_table():
    command = [sys.executable, "-m", "tsae_kernels"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name, state in tk.available_backends().items():
        assert name in out
        assert state in out
    assert "default on cpu" in out
