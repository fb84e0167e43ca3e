"""`python -m tsae.synthetic` from options to files, and what its tables say."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tsae.errors import UserError
from tsae.sae.kinds import KINDS
from tsae.synthetic.__main__ import main
from tsae.synthetic.command import run
from tsae.synthetic.methods import METHODS, READOUTS, train
from tsae.synthetic.settings import SETTINGS, quick

QUICK = ["--quick", "--settings", "mixed", "--methods", "batchtopk", "schmitt"]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "quick"
    assert main([*QUICK, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def found(out) -> dict[str, Any]:
    return json.loads((out / "synthetic.json").read_text())


def test_what_is_written(out, found):
    assert sorted(path.name for path in out.iterdir()) == ["synthetic.json", "synthetic.md", "synthetic.png"]
    assert (out / "synthetic.png").read_bytes().startswith(b"\x89PNG")
    assert list(found["settings"]) == ["mixed"]
    result = found["settings"]["mixed"]
    assert [group["dwell"] for group in result["groups"]] == pytest.approx([2, 8, 32, 128])
    assert list(result["methods"]) == ["truth", "batchtopk", "schmitt"]
    table = (out / "synthetic.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith("|  | smoother (not causal)"))
    part = result["methods"]["truth"]["rows"]["smoother"]["groups"][0]
    assert f"{part['ratio']:.3f} ({part['corr_hidden']:.3f})" in row
    assert found["quick"] is True


def test_one_token_tells_little_and_its_past_more(found):
    """What holds whatever the training: the order of the ceilings, and that nothing causal is above the filter."""
    methods = found["settings"]["mixed"]["methods"]
    truth = methods["truth"]["rows"]
    for group in range(4):
        one, leaky, best, all_tokens = (
            truth[name]["groups"][group]["corr_hidden"] for name in ("features", "leaky", "filter", "smoother")
        )
        assert one < leaky < best < all_tokens
        for name in ("batchtopk", "schmitt"):
            for row in methods[name]["rows"].values():
                part = row["groups"][group]
                assert part["of_bayes"] < 1.01
                if row["causal"]:
                    assert part["corr_hidden"] < best + 0.01
            assert methods[name]["rows"]["features"]["groups"][group]["ratio"] < 0.83
    for name in ("batchtopk", "schmitt"):  # dwell times of 8 tokens and more
        rows = methods[name]["rows"]
        assert methods[name]["mcc"] > 0.95
        for group in (2, 3):
            assert rows["filter"]["groups"][group]["of_bayes"] > 0.85
            assert rows["filter"]["groups"][group]["ratio"] > 1.0
        assert rows["hold"]["support_bits"] < rows["features"]["support_bits"]
        assert rows["hold"]["l0"] > rows["features"]["l0"]


def test_results_are_a_function_of_the_seed(out, found, capsys):
    again = out.parent / "again"
    assert main([*QUICK, "--out", str(again)]) == 0
    assert json.loads((again / "synthetic.json").read_text())["settings"] == found["settings"]
    assert "smoother (not causal)" in capsys.readouterr().out
    assert (again / "synthetic.png").read_bytes() == (out / "synthetic.png").read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--settings", "huge"], "There is no setting 'huge'; use published, mixed, "),
        (["--methods", "topk", "topk"], "The method topk is named twice; name each once."),
        (["--methods", "best"], "There is no method 'best'; use relu, topk, "),
        (["--steps", "0"], "--steps is 0; it must be at least 1."),
    ],
)
def test_errors_are_one_sentence(options, said, tmp_path, capsys):
    assert main(["--quick", *options, "--out", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")
    assert not (tmp_path / "new").exists()


def test_results_are_not_replaced_unasked(out, found, capsys):
    assert main([*QUICK, "--out", str(out)]) == 2
    assert "holds results already" in capsys.readouterr().err
    (out.parent / "file").write_text("")
    with pytest.raises(UserError, match="is a file; name a directory for --out"):
        run(["mixed"], ["topk"], small=True, out=out.parent / "file")
    assert json.loads((out / "synthetic.json").read_text()) == found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"features": 10}, "features is 10; it must be a multiple of the 4 dwell times"),
        ({"dwell": (1.0, 8.0, 32.0, 128.0)}, "independent draws already stay on for 1.006 tokens"),
        ({"pi": 1.0}, "pi is 1.0; it must be above 0 and below 1"),
        ({"rho": (0.1, 1.0)}, "rho is (0.1, 1.0); each must be at least 0 and below 1"),
    ],
)
def test_settings_that_cannot_be(changes, said):
    with pytest.raises(UserError) as error:
        replace(SETTINGS["mixed"], **changes).check()
    assert said in str(error.value)


def test_settings_and_methods_are_valid():
    for setting in SETTINGS.values():
        setting.check()
        quick(setting).check()
        assert 1 <= setting.k <= setting.d_sae
    for method in METHODS.values():
        assert method.sae["activation"] in KINDS
        assert set(method.readouts) <= set(READOUTS)
    published = SETTINGS["published"]
    assert (published.features, published.width, published.pi, published.emission) == (40, 80, 0.15, 0.625)


@pytest.mark.parametrize("name", list(READOUTS))
def test_causal_readouts_look_back_only(name):
    setting = quick(SETTINGS["mixed"])
    source = setting.source(0)
    truth = next(source.batches(1, 2, 40, 0))
    changed = truth.amplitude.clone()
    changed[:, 25:] = 1.0 - changed[:, 25:].clamp(max=1)
    readout = READOUTS[name]
    before, after = (readout.read(values, truth.segments, source.chain) for values in (truth.amplitude, changed))
    assert torch.equal(before[:, :25], after[:, :25]) is readout.causal
    assert not torch.equal(before, after)


def test_methods_train_on_the_same_stream():
    """A method's autoencoder does not depend on which others are trained beside it."""
    setting = replace(quick(SETTINGS["mixed"]), steps=5)
    source = setting.source(0)
    alone, both = (
        train({name: METHODS[name] for name in names}, setting, source, 0, lambda tokens: None)["topk"].state_dict()
        for names in (["topk"], ["schmitt", "topk"])
    )
    for name, tensor in alone.items():
        assert torch.equal(tensor, both[name])
