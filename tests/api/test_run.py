"""`Run`, `tsae.open` and `tsae.evaluate`: features of a text, their table, steering, autoencoders from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluated_run import D_SAE, LAYER, write_run, write_saelens
from tiny import sample_text

import tsae
from tsae.api.features import FeatureView
from tsae.api.run import Run
from tsae.errors import UserError
from tsae.evaluate import main
from tsae.evaluation import subject
from tsae.lm.hooks import activations

TEXT = "bar den gosh lun mir tosh"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_gemma3: Path) -> Path:
    """`run`, one of the main job without an evaluation, and `sae`, one of SAELens."""
    folder = tmp_path_factory.mktemp("api")
    write_run(folder / "run", tiny_gemma3, activation="schmitt")
    write_saelens(folder / "sae")
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return tsae.open(folder / "run")


def test_features_are_those_of_the_text_after_bos(run: Run) -> None:
    view = run.features(TEXT)
    ids = run.lm.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    x = activations(run.lm, torch.tensor([[run.lm.prefix_id, *ids]]), LAYER)[:, 1:].float()
    assert "".join(view.tokens) == TEXT
    assert view.activations.shape == (len(ids), D_SAE)
    torch.testing.assert_close(view.activations, run.sae.encode(x)[0].detach())
    assert run.lm is run.lm
    with pytest.raises(UserError, match="too few tokens"):
        run.features("")
    with pytest.raises(UserError, match=r"takes at most 512 tokens at once, but \d+ are fed"):
        run.features(sample_text(3000))


def view_of(*columns: list[float]) -> FeatureView:
    h = torch.tensor(columns).T
    return FeatureView([f"<{i}>" for i in range(len(h))], h)


def test_strongest_and_longest() -> None:
    view = view_of([0, 9, 0, 9], [1, 1, 1, 0], [0, 0, 0, 0], [0, 2, 2, 2], [3, 0, 3, 3])
    assert view.strongest(2).features == [0, 4]
    assert view.strongest().features == [0, 4, 3, 1]
    assert view.longest_runs().tolist() == [1, 3, 0, 3, 2]
    assert view.longest(3).features == [3, 1, 4]
    assert view.features == view.strongest(8).features
    assert view.only([2, 1]).features == [2, 1]
    assert view_of([0.0, 0.0]).longest(3).features == []
    assert "0 of 0 active features" in repr(view_of([0.0, 0.0]))


def test_the_table_is_shaded() -> None:
    view = view_of([0, 1, 2, 4], [0.5, 0, 0, 0])
    lines = repr(view).splitlines()
    assert lines[0] == "4 tokens; 2 of 2 active features"
    assert lines[2:5] == ["   <0><1><2><3>", "0  ···░░░▒▒▒███", "1  ███·········"]
    assert lines[-1] == "feature 1: maximum 0.5, on at 1 tokens, 1 in a row"
    html = view._repr_html_()
    assert html.count("<tr>") == 3
    assert "&lt;0&gt;" in html
    assert "<0>" not in html
    assert [part.split(")")[0] for part in html.split("rgba(230,159,0,")[1:5]] == ["0.00", "0.25", "0.50", "1.00"]
    wide = repr(FeatureView(["word "] * 60, torch.ones(60, 1)))
    assert max(map(len, wide.splitlines())) <= 100
    assert wide.count("word ") == 60


def test_steering_raises_a_feature_and_ablation_removes_it(run: Run) -> None:
    view = run.features(TEXT)
    (feature,) = view.strongest(1).features
    plain = run.lm.generate(TEXT, max_new_tokens=8)
    with run.steer({feature: 20.0}) as inside:
        steered = inside.features(TEXT).activations[:, feature]
        assert run.lm.generate(TEXT, max_new_tokens=8) != plain
    assert bool((steered > view.activations[:, feature]).all())
    with run.ablate(feature):
        assert float(run.features(TEXT).activations[:, feature].max()) < 1e-4
    with run.steer({feature: 20.0}, positions=slice(2, None)):
        after = run.features(TEXT).activations
    assert torch.equal(after[:2], view.activations[:2])
    assert torch.equal(run.features(TEXT).activations, view.activations)
    assert run.lm.generate(TEXT, max_new_tokens=8) == plain


def test_features_may_be_integers_of_numpy_and_of_tensors(run: Run) -> None:
    view = run.features(TEXT)
    best = view.activations.amax(0).argmax()  # int64 []
    with run.steer({int(best): 20.0, 3: 1.0}):
        expected = run.features(TEXT).activations
    for feature in (best, best.numpy()[()]):
        with run.steer({feature: 20.0, 3: 1.0}):  # type: ignore[dict-item]
            assert torch.equal(run.features(TEXT).activations, expected)
        with run.ablate(feature):
            assert float(run.features(TEXT).activations[:, best].max()) < 1e-4
    with run.ablate(best[None]):
        assert float(run.features(TEXT).activations[:, best].max()) < 1e-4
    with (
        pytest.raises(UserError, match=r"There is no feature 1\.5; the autoencoder has 48, 0 to 47"),
        run.steer({1.5: 1.0}),  # type: ignore[dict-item]
    ):
        pass
    with pytest.raises(UserError, match=r"give a dictionary of strengths by feature"), run.steer(5):  # type: ignore[arg-type]
        pass
    for read in (run.features, run.lm.generate):
        with pytest.raises(UserError, match=r"The text is of type list; give one string"):
            read([TEXT])  # type: ignore[arg-type]


def test_objects_say_in_one_line_what_they_are(run: Run) -> None:
    assert repr(run.lm).startswith(f"LanguageModel({run.lm.name!r}): Gemma3ForCausalLM, {run.lm.n_layers} layers, ")
    assert "\n" not in repr(run.lm)
    assert repr(run.sae) == f"SparseAutoencoder(d_in={run.sae.cfg.d_in}, d_sae=48, activation=schmitt)"


def test_an_autoencoder_of_another_library_is_the_same_object(folder: Path, tiny_gemma3: Path) -> None:
    text = str(folder / "text.txt")
    with pytest.raises(UserError, match="is not a run, so its model is not known; name it with `model`"):
        tsae.open(folder / "sae")
    with pytest.raises(UserError, match="does not say which layer it encodes; name it with `layer`"):
        tsae.open(folder / "sae", model=str(tiny_gemma3))
    other = tsae.open(str(folder / "sae"), model=str(tiny_gemma3), layer=LAYER, device="cpu", lm_dtype="float32")
    assert other.lm.dtype == torch.float32
    assert isinstance(other, Run)
    assert (other.directory, other.metrics, other.history) == (None, {}, {})
    assert other.features(TEXT).activations.shape[1] == D_SAE
    assert "48 features (relu)" in repr(other)
    assert "48 features (relu)" in other._repr_html_()
    with pytest.raises(UserError, match=r"is no run, so there is nothing to draw; evaluate\(\) has its metrics"):
        other.report()
    before = sorted(folder.rglob("*"))
    table = other.evaluate(data=text, tokens=300, ce_sequences=1)
    assert set(table.to_dict()) == {"sae"}
    assert sorted(folder.rglob("*")) == before
    with pytest.raises(UserError, match="There is no feature 48"), other.steer({D_SAE: 1.0}):
        pass


def test_evaluate_has_the_model_as_it_was_opened(
    folder: Path, tiny_gemma3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[dict[str, Any]] = []

    def load(name: str, **options: Any) -> Any:
        loaded.append(options)
        raise UserError("enough")

    monkeypatch.setattr(subject, "load_language_model", load)
    asked = {"lm_dtype": "float16", "lm_quantization": "8bit", "trust_remote_code": True, "revision": "main"}
    other = tsae.open(folder / "sae", model=str(tiny_gemma3), layer=LAYER, lm_device="cpu", **asked)
    for use in (lambda: other.lm, lambda: other.evaluate(tokens=300, data=str(folder / "text.txt"))):
        with pytest.raises(UserError, match="enough"):
            use()
    assert loaded[0] == loaded[1]
    assert (loaded[0]["dtype"], loaded[0]["quantization"], loaded[0]["revision"]) == ("float16", "8bit", "main")
    for name in ("lm_dtype", "lm_quantization", "revision"):
        with pytest.raises(UserError, match=f"`{name}` is for autoencoders with `model`; a run's metrics are of its"):
            tsae.open(folder / "run", **{name: asked[name]}).evaluate()
    with pytest.raises(UserError, match="lm_device_map divides the language model among all GPUs, without device"):
        tsae.open(folder / "run", device="cpu", lm_device_map="auto")


def test_evaluate_measures_as_the_command_does(
    folder: Path, run: Run, tiny_gemma3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {"tokens": 300, "ce_sequences": 1, "data": str(folder / "text.txt")}
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in few.items()]
    assert main([str(folder / "run"), *argv, "--out", str(tmp_path / "command.json")]) == 0
    printed = capsys.readouterr().out
    table = tsae.evaluate(run, out=tmp_path / "function.json", **few)
    assert capsys.readouterr().out == ""
    expected = json.loads((tmp_path / "command.json").read_text())
    assert table.to_dict() == {"run": expected} == {"run": json.loads((tmp_path / "function.json").read_text())}
    assert table["run"] == run.metrics == expected
    value = f"{expected['explained_variance']:.4f}"
    assert value in printed
    assert value in repr(table)
    assert value in table._repr_html_()
    assert "eval.json and " in repr(table)
    assert run.report().png.startswith(b"\x89PNG")

    both = tsae.evaluate(folder / "run", str(folder / "sae"), layer=LAYER, **few)
    assert list(both.to_dict()) == ["run", "sae"]
    assert both.to_dict()["run"]["explained_variance"] == pytest.approx(expected["explained_variance"])
    assert both._repr_html_().count("<tr>") == 3
    assert len([line for line in repr(both).splitlines() if line.startswith(("run ", "sae "))]) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: tsae.evaluate(), "No autoencoder is named"),
        (lambda run: tsae.evaluate(run, token=3), "There is no option 'token'; the nearest is 'tokens'."),
        (lambda run: tsae.evaluate(run, tokens=0), "`tokens` is 0; it must be at least 1."),
        (lambda run: tsae.evaluate("nowhere"), "There is no run directory nowhere"),
        (lambda run: tsae.open(run.source, steps=3), "tsae.open has no option 'steps'"),
        (
            lambda run: tsae.open(run.source, lm_dtypes="x"),
            "There is no option 'lm_dtypes'; the nearest is 'lm_dtype'.",
        ),
        (lambda run: tsae.open("nowhere/at/all", model="x", layer=1), "nowhere/at/all"),
    ],
)
def test_bad_arguments_are_one_sentence(call: Callable[[Run], Any], message: str, run: Run) -> None:
    with pytest.raises(UserError) as error:
        call(run)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_names_no_autoencoder_is_a_type_error(run: Run) -> None:
    with pytest.raises(TypeError, match="SparseAutoencoder names no autoencoder"):
        tsae.evaluate(run.sae)
