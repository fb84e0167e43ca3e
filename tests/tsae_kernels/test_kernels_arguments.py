"""Errors name the argument, what it was and what it should be; backends are chosen by rule."""

import subprocess
import sys

import pytest
import torch

import tsae_kernels as tk

H = torch.randn(2, 6, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"h": [1.0]}, TypeError, ["h must be", "list"]),
        ({"h": torch.ones(2, 6, 3, dtype=torch.int64)}, TypeError, ["h must be float64", "int64"]),
        ({"h": torch.ones(6, 3)}, ValueError, ["h must be", "[6, 3]"]),
        ({"h": torch.ones(2, 0, 3)}, ValueError, ["h must be", "[2, 0, 3]"]),
        ({"bands": 3}, TypeError, ["bands must be", "int"]),
        ({"bands": ((1, 2, 3),)}, ValueError, ["bands must be", "(1, 2, 3)"]),
        ({"bands": ((0, 2),)}, ValueError, ["bands must have 1 <=", "(0, 2)"]),
        ({"bands": ((3, 2),)}, ValueError, ["bands must have", "(3, 2)"]),
        ({"bands": ((1, 3), (3, 5))}, ValueError, ["disjoint and ascending"]),
        ({"bands": ((4, 5), (1, 3))}, ValueError, ["disjoint and ascending"]),
        ({"bands": ((1.0, 3),)}, TypeError, ["integer offsets", "1.0"]),
        ({"segments": torch.zeros(2, 6)}, TypeError, ["segments must be", "float32"]),
        ({"segments": torch.zeros(6, dtype=torch.int64)}, ValueError, ["segments must have shape [2, 6]"]),
        ({"backend": "fast"}, ValueError, ["backend must be one of", "'fast'", "'eager'"]),
        ({"backend": 3}, TypeError, ["backend must be", "3"]),
    ],
)
def test_bad_arguments_of_temporal_stats(arguments, error, words):
    with pytest.raises(error) as raised:
        tk.temporal_stats(**{"h": H, **arguments})
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"bias": torch.zeros(4)}, ValueError, ["bias must have shape [3]", "[4]"]),
        ({"bias": 0.5}, TypeError, ["bias must be a tensor", "0.5"]),
        ({"activation": "tanh"}, ValueError, ["activation must be one of", "'tanh'"]),
        ({"activation": "gelu", "threshold": 0.1}, ValueError, ["threshold must be None", "'gelu'"]),
        ({"threshold": "high"}, TypeError, ["threshold must be a number or a tensor", "'high'"]),
        ({"threshold": torch.zeros(4)}, ValueError, ["threshold must be", "[B, T, 1]", "[2, 6, 3]", "[4]"]),
        ({"threshold": torch.zeros(3).long()}, TypeError, ["threshold must be a floating-point", "int64"]),
        ({"threshold": float("nan")}, ValueError, ["threshold must be a number", "nan"]),
        ({"release": 0.1}, ValueError, ["release must be None without a threshold"]),
        ({"threshold": 0.1, "release": 0.2}, ValueError, ["0 <= release <= threshold", "0.2", "0.1"]),
        ({"threshold": 0.1, "release": -0.2}, ValueError, ["0 <= release <= threshold", "-0.2"]),
        ({"threshold": torch.tensor([0.5, 0.1, 0.5]), "release": 0.2}, ValueError, ["release=0.2"]),
        ({"threshold": 0.5, "release": torch.tensor([-1.0, 0.1, 0.1])}, ValueError, ["-1.0"]),
        ({"threshold": 0.5, "release": torch.zeros(2, 6, 1)}, ValueError, ["release must be", "[k]"]),
    ],
)
def test_bad_arguments_of_activate_with_stats(arguments, error, words):
    with pytest.raises(error) as raised:
        tk.activate_with_stats(H, **arguments)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: tk.encode_with_stats(H, torch.zeros(4, 5)),
            ValueError,
            ["weight must be", "d = 3", "[4, 5]"],
        ),
        (
            lambda: tk.encode_with_stats(H, torch.zeros(3, 5).double()),
            TypeError,
            ["weight must be", "float64"],
        ),
        (lambda: tk.temporal_loss(H, (1.0,)), ValueError, ["weights must have one number per band: 3", "1"]),
        (lambda: tk.temporal_loss(H, 0.5), TypeError, ["weights must be a sequence", "float"]),
        (lambda: tk.temporal_loss(H, variance=torch.ones(4)), ValueError, ["variance must have shape [3]"]),
        (
            lambda: tk.temporal_loss(H, min_variance="low"),
            TypeError,
            ["min_variance must be a number", "str"],
        ),
        (lambda: tk.window_consistency(H, 1), ValueError, ["window must be at least 2", "1"]),
        (lambda: tk.window_consistency(H, 2.5), TypeError, ["window must be an integer", "2.5"]),
    ],
)
def test_bad_arguments_elsewhere(call, error, words):
    with pytest.raises(error) as raised:
        call()
    for word in words:
        assert word in str(raised.value)


def test_table_of_backends():
    table = tk.available_backends()
    assert set(table) == {"reference", "eager", "cpp", "triton", "cuda"}
    assert table["reference"] == table["eager"] == "ok"
    assert all(isinstance(state, str) and state for state in table.values())


def test_a_backend_that_is_not_there_fails_with_its_reason_and_the_remedy(monkeypatch):
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


def test_the_variable_chooses_and_the_argument_wins(monkeypatch):
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
