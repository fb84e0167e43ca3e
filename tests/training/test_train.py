"""The main job end to end on tiny models of the real classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import leaves, lines, options

from tsae.sae.model import SparseAutoencoder
from tsae.train import command, main
from tsae.training import assemble
from tsae.training.trainer import Trainer


@pytest.mark.parametrize(
    ("model", "preset"),
    [("tiny_gemma2", "tsae-gemma-2-2b"), ("tiny_neox", "tcsae-pythia-70m"), ("tiny_gemma3", "demo")],
)
def test_every_preset_runs_end_to_end(
    model: str, preset: str, text_file: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    out = tmp_path / "run"
    more = ["--optimizer.warmup-steps", "1", "--optimizer.lr", "1e-3"]
    assert main(options(request.getfixturevalue(model), text_file, out, *more, preset=preset)) == 0
    names = {p.name for p in out.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "checkpoint", "sae", "eval.json", "report.png"}
    logged = lines(out / "metrics.jsonl")
    assert [line["step"] for line in logged] == [1, 3, 6, 9, 12]
    wanted = {"loss", "reconstruction", "sparsity", "temporal", "auxiliary", "explained_variance", "l0", "dead", "lr"}
    wanted |= {"lag1_correlation", "lag1_correlation_p10", "lag1_correlation_p50", "lag1_correlation_p90", "tokens"}
    assert all(wanted <= set(line) for line in logged)
    assert logged[-1]["reconstruction"] < logged[0]["reconstruction"]
    assert logged[-1]["tokens"] <= 12 * 4 * 128
    values = json.loads((out / "eval.json").read_text())
    assert all(isinstance(leaf, (int, float)) and abs(leaf) < 1e30 for leaf in leaves(values))
    config = json.loads((out / "config.json").read_text())
    assert (config["preset"], config["steps"], config["sae"]["d_sae"]) == (preset, 12, 48)
    assert config["text"]["threshold"] == 0.2  # fixes the split, even if the text changes
    sae = SparseAutoencoder.load(out / "sae")
    assert sae.W_enc.shape == (sae.cfg.d_in, 48)
    if preset == "tcsae-pythia-70m":
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48))
        assert (sae.cfg.activation, logged[0]["temporal"] > 0) == ("gelu", True)


@pytest.mark.usefixtures("blank_report")
def test_the_start_up_line_states_the_buffers_bound(
    tiny_neox: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = "--steps 3 --batch 32 --buffer.sequences 64 --buffer.dtype float32 --evaluation.no-final"
    more += " --lm-dtype float32 --autocast none"
    assert main(options(tiny_neox, text_file, tmp_path / "run", *more.split())) == 0
    start = " ".join(capsys.readouterr().err.split())
    # 64 sequences x 128 tokens x width 32 x 4 bytes = 1 MiB
    assert "Activation buffer: at most 64 sequences, 1 MiB (float32)" in start
    assert "layer 1 (float32) on cpu, 48 rate features, 3 steps of 32 x 128 tokens." in start
    assert start.index("Activation buffer") < start.index("Harvest") < start.index("Training")


@pytest.mark.usefixtures("blank_report")
def test_mean_and_scale_come_from_positions_that_count(tiny_neox: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the river ran under a bridge {i}.\n\n" for i in range(3000)))
    out = tmp_path / "run"
    left_out = ["--buffer.max-norm-ratio", "1.1"]
    assert main(options(tiny_neox, text, out, "--steps", "4", "--evaluation.no-final", *left_out)) == 0
    held = load_file(out / "checkpoint" / "buffer-0001.safetensors")  # everything harvested
    kept = held["segments"] >= 0
    assert int((~kept).sum()) > 0
    x = held["x"][kept].double()
    state = torch.load(out / "checkpoint" / "step-00000004" / "state.pt", weights_only=True)
    normalizer = state["trainers"][""]["normalizer"]
    torch.testing.assert_close(normalizer["mean"].double(), x.mean(0), rtol=1e-5, atol=1e-6)
    assert normalizer["scale"] == pytest.approx(float(x.var(0, correction=0).mean().sqrt()), rel=1e-5)


@pytest.mark.usefixtures("blank_report")
def test_both_evaluations_read_only_text_that_training_does_not(
    tiny_neox: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every decoded segment that reaches the metrics is in the evaluation part, none in the training part."""
    import tsae.evaluate
    import tsae.evaluation.command
    import tsae.evaluation.evaluator
    import tsae.training.run
    from tsae.data.text import TextConfig, open_text

    seen: list[list[str]] = []
    real = tsae.evaluation.evaluator.evaluate_all

    def spy(saes: Any, lm: Any, batches: list[Any], **options: Any) -> Any:
        segments: list[str] = []
        for batch in batches:
            for row, ids in zip(batch.tokens[:, 1:], batch.segments, strict=True):
                segments += [lm.tokenizer.decode(row[ids == i]) for i in ids.unique() if i >= 0]
        seen.append(segments)
        return real(saes, lm, batches, **options)

    monkeypatch.setattr(tsae.training.run, "evaluate_all", spy)
    monkeypatch.setattr(tsae.evaluation.command, "evaluate_all", spy)
    out = tmp_path / "run"
    assert main(options(tiny_neox, text_file, out, "--steps", "2")) == 0
    assert tsae.evaluate.main([str(out)]) == 0

    def part(name: Any) -> str:
        config = TextConfig(evaluation_share=0.2)
        return "\0".join(d.text for d in open_text(str(text_file), part=name, seed=0, config=config))

    held_out, trained_on = part("evaluation"), part("train")
    assert len(seen) == 2
    for segments in seen:
        assert len(segments) >= 8
        assert all(text in held_out for text in segments)
        assert not any(text in trained_on for text in segments if len(text) > 100)
    assert seen[0] == seen[1]


def test_excluded_positions_change_nothing(tiny_gemma2: Path, text_file: Path) -> None:
    """Poison at positions of negative segment id reaches neither the weights nor a logged figure."""
    from dataclasses import replace

    from tsae.data.harvest import ActivationBatch
    from tsae.sae.normalization import InputNormalizer

    for activation in ("schmitt", "batchtopk", "topk", "relu", "jumprelu", "jumprelu_schmitt"):
        more = "--sae.d-sae 32 --sae.k 4 --objective.l1 0.1 --objective.hold-steps 0 --objective.dead-after-tokens 1"
        cfg, _ = command(["demo", *more.split(), "--sae.activation", activation])
        cfg = replace(cfg, sae=replace(cfg.sae, d_in=8))
        x = torch.randn(4, 20, 8, generator=torch.Generator().manual_seed(0))
        segments = torch.zeros(4, 20, dtype=torch.int32)
        segments[:, 7] = -1
        segments[2, 15:] = -1
        poisoned = x.clone()
        poisoned[segments < 0] = 1e4
        results = []
        for data in (x, poisoned):
            trainer = Trainer(cfg, InputNormalizer(torch.zeros(8), 1.0), torch.device("cpu"), autocast=False)
            logged = [trainer.train_step(ActivationBatch(data, segments), log=True) for _ in range(3)]
            results.append((trainer.sae.state_dict(), logged))
        for name, tensor in results[0][0].items():
            torch.testing.assert_close(tensor, results[1][0][name], rtol=1e-5, atol=1e-6)
        for a, b in zip(results[0][1], results[1][1], strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


@pytest.mark.usefixtures("blank_report")
def test_the_language_model_can_have_a_device_of_its_own(
    tiny_gemma2: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = []
    load = assemble.load_language_model
    monkeypatch.setattr(
        assemble, "load_language_model", lambda name, **more: asked.append(more["device"]) or load(name, **more)
    )
    for number, more in enumerate((["--lm-device", "cpu:0"], [])):
        assert main(options(tiny_gemma2, text_file, tmp_path / str(number), "--device", "cpu", *more)) == 0
    assert asked == [torch.device("cpu:0"), torch.device("cpu")]
    assert "on cpu:0, autoencoder on cpu" in " ".join(capsys.readouterr().err.split())
    written = [(tmp_path / f"{number}/sae/sae_weights.safetensors").read_bytes() for number in (0, 1)]
    assert written[0] == written[1]
