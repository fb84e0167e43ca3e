"""Options as keywords: names, types, and that every option of the command lines is one."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tsae
from tsae.api.options import aliases, names, nearest, override
from tsae.config import CheckpointConfig, ObjectiveConfig, SAEConfig, TrainConfig
from tsae.errors import UserError
from tsae.evaluation.command import Arguments
from tsae.training.request import Request
from tsae.utils.calling import from_python, in_python, option, resume_call


def test_nested_dictionaries_dotted_names_and_dataclasses() -> None:
    base = TrainConfig(steps=7)
    found = override(base, {"sae": {"d_sae": 64, "groups": [8, 64]}, "optimizer.betas": (0.5, 0.9), "sae.k": 3})
    assert (found.steps, found.sae.d_sae, found.sae.groups, found.sae.k) == (7, 64, (8, 64), 3)
    assert found.optimizer.betas == (0.5, 0.9)
    assert found.sae.activation == base.sae.activation
    assert base == TrainConfig(steps=7)
    assert override(base, {"sae": SAEConfig(d_sae=9)}).sae == SAEConfig(d_sae=9)


def test_values_of_other_libraries_are_taken() -> None:
    found = override(
        Request(),
        {
            "steps": np.int64(5),
            "optimizer": {"lr": np.float32(0.5)},
            "model": Path("a/b"),
            "out": "runs/x",
            "device": torch.device("cpu"),
            "layer": np.int32(3),
        },
    )
    assert (found.steps, found.optimizer.lr, found.model, found.out) == (5, 0.5, "a/b", Path("runs/x"))
    assert (found.device, found.layer) == ("cpu", 3)
    assert type(found.steps) is int


def test_the_command_lines_alias_holds() -> None:
    assert aliases(TrainConfig) == {"objective": "objective.temporal"}
    assert override(TrainConfig(), {"objective": "slow"}).objective == ObjectiveConfig(temporal="slow")
    assert override(TrainConfig(), {"objective": {"weight": 2}}).objective == ObjectiveConfig(weight=2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stepz": 3}, "There is no option 'stepz'; the nearest is 'steps'."),
        ({"d_sae": 3}, "There is no option 'd_sae'; the nearest is sae={'d_sae': ...}."),
        ({"sae": {"dsae": 3}}, "There is no option 'sae.dsae'; the nearest is sae={'d_sae': ...}."),
        ({"sae_k": 3}, "There is no option 'sae_k'; the nearest is sae={'k': ...}."),
        ({"sae": {"k": {"x": 1}}}, "must be of type int"),
        ({"steps": "many"}, "'steps' is 'many'; it must be of type int."),
        ({"steps": True}, "'steps' is True; it must be of type int."),
        ({"normalize": 1}, "'normalize' is 1; it must be of type bool."),
        ({"lm_dtype": "int8"}, "it must be one of"),
        ({"sae": 3}, "sae is 3; give a dictionary of its options, or a SAEConfig."),
        ({"sae": SAEConfig(), "sae.k": 3}, "sae is given twice; give it once."),
    ],
)
def test_what_cannot_be_taken_is_one_sentence(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        override(TrainConfig(), options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_names_of_options_given() -> None:
    given = {"steps": 1, "sae": {"k": 2}, "parallel.features": 2, "checkpoint": CheckpointConfig()}
    assert names(given) == ["steps", "sae.k", "parallel.features", "checkpoint.every", "checkpoint.keep"]
    assert nearest("overwrit", [f.name for f in dataclasses.fields(Request)]) == "'overwrite'"


@pytest.mark.parametrize(("function", "options"), [("train", Request), ("evaluate", Arguments)])
def test_every_option_of_a_command_line_is_a_keyword(function: str, options: type) -> None:
    shown = inspect.signature(getattr(tsae, function)).parameters
    assert {field.name for field in dataclasses.fields(options)} <= set(shown)
    assert all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in shown.values())


def test_messages_name_options_as_the_user_writes_them() -> None:
    assert in_python("name it with --sae.d-sae, or --evaluation.no-final.") == (
        "name it with `sae.d_sae`, or `evaluation.final=False`."
    )
    assert in_python("a--b and runs/--x, python -m tsae.evaluate") == "a--b and runs/--x, tsae.evaluate"
    assert resume_call(Path("a b")) == "python -m tsae.train --resume a b"
    assert option("overwrite") == "--overwrite"
    with from_python():
        assert resume_call(Path("a b")) == "tsae.train(resume='a b')"
        assert (option("overwrite"), option("out", Path("x"))) == ("overwrite=True", "out='x'")
    with pytest.raises(UserError, match=r"^use `out`$"), from_python():
        raise UserError("use --out")


ORDERS = {
    "attribute first": "import tsae; f = tsae.train; e = tsae.evaluate; import tsae.train, tsae.evaluate",
    "submodule first": "import tsae.evaluate, tsae.train; import tsae",
    "from": "from tsae import evaluate, train; import tsae; from tsae.train import main; import tsae.train as t",
    "names of submodules": "from tsae.evaluate import evaluate as old, main; import tsae.train as t; import tsae",
    "functions first": "import tsae.api.training, tsae.api.evaluation; import tsae",
    "reloaded": "import importlib, tsae.train; importlib.reload(tsae.train); import tsae",
}
CHECK = """
import inspect
assert callable(tsae.train) and callable(tsae.evaluate)
assert "sae" in inspect.signature(tsae.train).parameters and "tokens" in inspect.signature(tsae.evaluate).parameters
assert callable(tsae.train.main) and callable(tsae.train.command) and callable(tsae.evaluate.main)
from tsae.evaluate import evaluate
from tsae.evaluation.evaluator import evaluate as defined
assert evaluate is defined
for call in (lambda: tsae.train(stepz=1), lambda: tsae.evaluate("x", tokenz=1)):
    try:
        call()
    except tsae.UserError as error:
        assert "There is no option" in str(error), error
    else:
        raise AssertionError
"""


@pytest.mark.parametrize("order", ORDERS)
def test_train_and_evaluate_are_functions_and_modules_in_any_order_of_imports(order: str) -> None:
    """Importing a submodule sets the attribute of the package."""
    code = f"{ORDERS[order]}\n{CHECK}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
