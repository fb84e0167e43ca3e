"""Training from Python does what the command line does, and says what Python needs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import run_options, same, weights

import tsae
from tsae.api.run import Run
from tsae.errors import UserError
from tsae.train import command, main
from tsae.training.dry_run import Estimate
from tsae.utils.interrupts import Interrupted

pytestmark = pytest.mark.usefixtures("blank_report")


@pytest.fixture
def options(tiny_gemma2: Path, text_file: Path) -> dict[str, Any]:
    """`run_options` as keywords."""
    cfg, _ = command(run_options(tiny_gemma2, text_file, Path("unused")))
    return {
        "model": tiny_gemma2,
        "data": text_file,
        "layer": 1,
        "steps": 24,
        "batch": 4,
        "log_every": 3,
        "device": "cpu",
        "sae": {"d_sae": 96, "k": 1},
        "objective": {
            "temporal": "contrastive+window",
            "hold_steps": 4,
            "ramp_steps": 4,
            "dead_after_tokens": 600,
        },
        "optimizer": {"noise_eta": 0.1, "clip_norm": 2},
        "buffer": cfg.buffer,
        "checkpoint": {"every": 4},
        "evaluation": {"sequences": 8, "ce_sequences": 4, "final": False},
        "text.evaluation_share": 0.2,
    }


def test_the_function_and_the_command_train_the_same(
    uninterrupted: Path, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tsae.train("demo", out=tmp_path / "run", **options)
    assert isinstance(run, Run)
    assert run.directory == tmp_path / "run"
    same(uninterrupted, run.directory)
    config = [(path / "config.json").read_text() for path in (uninterrupted, run.directory)]
    assert config[0] == config[1]
    assert torch.equal(run.sae.W_dec, weights(uninterrupted)["W_dec"])
    assert run.metrics == {}
    assert run.history["l0"][0].tolist() == [1, 3, 6, 9, 12, 15, 18, 21, 24]
    assert capsys.readouterr().out == ""


def test_an_interrupted_cell_is_saved_and_continued(
    uninterrupted: Path, options: dict[str, Any], tmp_path: Path, at_step: Callable[..., None]
) -> None:
    out, before = tmp_path / "run", signal.getsignal(signal.SIGINT)
    at_step(5, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt) as stop:
        tsae.train("demo", out=out, **options)
    assert str(stop.value) == f"interrupted after step 6, which is saved; continue with tsae.train(resume={str(out)!r})"
    assert stop.value._render_traceback_() == [f"Interrupted{stop.value.advice}"]
    assert signal.getsignal(signal.SIGINT) is before
    at_step()
    same(uninterrupted, tsae.train(resume=str(out)).directory)


def test_interrupted_before_anything_began(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tsae.training import run

    monkeypatch.setattr(run, "prepare", lambda job, **_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match=r"^interrupted before anything began; start again$"):
        tsae.train("demo", out=tmp_path / "run", **options)


def test_interrupted_while_it_is_evaluated(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tsae.training import run

    out, few = tmp_path / "run", options | {"steps": 2, "evaluation": {"sequences": 8, "ce_sequences": 4}}
    with monkeypatch.context() as patch:
        patch.setattr(run, "_evaluate", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted) as stop:
            tsae.train("demo", out=out, **few)
    advice = f"after the last step, which is saved; continue with tsae.train(resume={str(out)!r})"
    assert str(stop.value) == f"interrupted {advice}"
    assert tsae.train(resume=out).metrics["l0"] > 0


def test_help_and_completion_show_what_is_there() -> None:
    assert "preset: the configuration to start from" in str(tsae.train.__doc__)
    assert "saes: run d" in str(tsae.evaluate.__doc__)
    public = {name for name in dir(tsae) if not name.startswith("_")}
    assert public == {*tsae.__all__, "open"}


def test_a_run_that_was_replaced_is_not_taken_for_the_old_one(options: dict[str, Any], tmp_path: Path) -> None:
    few = options | {"steps": 2}
    first = tsae.train("demo", out=tmp_path / "run", **few)
    with pytest.raises(
        UserError, match=r"already has a run; continue it with resume='.*', or replace it with overwrit"
    ):
        tsae.train("demo", out=tmp_path / "run", **few)
    second = tsae.train("demo", out=tmp_path / "run", overwrite=True, **few)
    with pytest.raises(UserError, match="has been replaced or removed since; open it again"):
        _ = first.sae
    with pytest.raises(UserError, match="has been replaced or removed since; open it again"):
        _ = first.metrics
    assert second.sae.cfg.d_sae == 96


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"resume": "x", "steps": 3, "sae": {"k": 1}},
            "`resume` takes the run's own configuration; leave out `steps` `sae.k`.",
        ),
        ({"resume": "x"}, "x holds no run to resume; it has no config.json."),
        ({"preset": "demo", "config": "c.json"}, "Both preset and config are given; name one of them to start from."),
        ({"preset": "x"}, "There is no preset 'x'; choose one of "),
        ({"sweep": "s.yaml", "steps": 3}, "The options of a sweep are in its file; leave out `steps`."),
        ({"temporal": 3}, "temporal is 3; give a function, or a dictionary of functions by name."),
        ({"model": "nowhere/at/all"}, "no model at 'nowhere/at/all'"),
        ({"sae": {"k": 0}, "steps": 3}, "sae.k is 0; it must be from 1 to sae.d_sae"),
        ({"overwritten": True}, "There is no option 'overwritten'; the nearest is 'overwrite'."),
    ],
)
def test_bad_options_are_one_sentence(
    more: dict[str, Any], message: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "resume" not in more and "sweep" not in more:
        more = {"data": text_file} | more
    with pytest.raises(UserError) as error:
        tsae.train(**more)
    assert message in str(error.value)
    assert error.value._render_traceback_() == [f"UserError: {error.value}"]
    assert not list(tmp_path.iterdir())


def test_a_configuration_as_a_file_a_dictionary_and_an_object(
    uninterrupted: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    import json

    from tsae.rundir.directory import read_config

    file = uninterrupted / "config.json"
    given = (str(file), json.loads(file.read_text()), read_config(uninterrupted))
    runs = [tsae.train(config=each, steps=2, out=tmp_path / str(n)) for n, each in enumerate(given)]
    first, *others = (run.config for run in runs)
    assert (first.steps, first.sae.d_sae, first.preset) == (2, 96, "demo")
    assert [other == first for other in others] == [True, True]


def test_an_autoencoder_to_start_from_and_a_length(
    uninterrupted: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    """As on the command line: options given override what is taken over; another length keeps a batch's tokens."""
    more = {name: value for name, value in options.items() if name not in ("sae", "buffer", "batch")}
    run = tsae.train("demo", out=tmp_path / "run", init_from=str(uninterrupted), **more | {"steps": 2, "length": 64})
    cfg, _ = command(["--length", "64"])
    assert (run.config.length, run.config.batch) == (64, cfg.batch)
    assert (run.config.sae.d_sae, run.config.sae.k) == (96, 1)
    with pytest.raises(UserError, match="d_sae"):
        tsae.train("demo", out=tmp_path / "b", init_from=str(uninterrupted), sae={"d_sae": 48}, **more)


def test_a_dry_run_is_an_estimate(options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    estimate = tsae.train("demo", out=tmp_path / "run", dry_run=True, **options)
    assert isinstance(estimate, Estimate)
    assert estimate.memory
    assert "Dry run: nothing was written" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_sweep_is_a_dictionary_of_runs(
    tiny_gemma2: Path, text_file: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    import yaml

    base = options | {"model": str(tiny_gemma2), "data": str(text_file), "steps": 2}
    base |= {"buffer": vars(base["buffer"]), "text": {"evaluation_share": base.pop("text.evaluation_share")}}
    runs = {"a": {"sae.k": 1}, "b": {"sae.k": 2}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"base": base, "runs": runs}))
    found = tsae.train(sweep=tmp_path / "s.yaml", out=tmp_path / "sweep")
    assert {name: run.config.sae.k for name, run in found.items()} == {"a": 1, "b": 2}
    assert "stays on" in repr(found)
    assert found._repr_html_().count("<tr>") == 3


def test_the_command_prints_what_the_function_returns(
    options: dict[str, Any], argv_of: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--steps", "2", "--evaluation.final"]
    assert main(argv_of(tmp_path / "command", *more)) == 0
    printed = capsys.readouterr().out
    evaluation = options["evaluation"] | {"final": True}
    run = tsae.train("demo", out=tmp_path / "function", **options | {"steps": 2, "evaluation": evaluation})
    assert capsys.readouterr().out == ""
    assert f"{run.metrics['explained_variance']:.4f}" in printed
    assert f"{run.metrics['explained_variance']:.4f}" in run._repr_html_()
    assert "96 features (rate)" in repr(run)
