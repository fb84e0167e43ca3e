"""What stops a run: bad input, non-finite numbers. Each gives one sentence, and nothing is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import options

from tsae.data.harvest import Harvester
from tsae.errors import UserError
from tsae.train import main
from tsae.training import checkpoint
from tsae.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("blank_report")


@pytest.mark.parametrize("term", ["reconstruction", "temporal"])
def test_a_loss_that_is_not_finite_stops_with_step_term_and_checkpoint(
    term: str,
    tiny_neox: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import tsae.training.trainer

    real = tsae.training.trainer.objective

    def broken(inputs: Any, step: int, cfg: Any) -> Any:
        terms = real(inputs, step, cfg)
        if step < 6:
            return terms
        bad = torch.tensor(float("nan"))
        return terms._replace(**{term: bad, "total": terms.total * bad})

    monkeypatch.setattr(tsae.training.trainer, "objective", broken)
    out = tmp_path / "run"
    assert main(options(tiny_neox, text_file, out)) == 2
    message = capsys.readouterr().err
    assert f"step 7: the {term} term of the loss is nan" in message
    assert str(out / "checkpoint" / "step-00000004") in message
    assert not (out / "sae").exists()
    state = torch.load(out / "checkpoint" / "step-00000004" / "state.pt", weights_only=True)
    assert all(torch.isfinite(v).all() for v in state["trainers"][""]["sae"].values())


class BrokenGradient(torch.autograd.Function):
    """The identity with a NaN gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad * float("nan")


@pytest.mark.parametrize("broken_at", [7, 12])
def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(
    broken_at: int,
    tiny_neox: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import tsae.training.trainer

    real = tsae.training.trainer.objective

    def broken(inputs: Any, step: int, cfg: Any) -> Any:
        terms = real(inputs, step, cfg)
        return terms._replace(total=BrokenGradient.apply(terms.total)) if step == broken_at - 1 else terms

    monkeypatch.setattr(tsae.training.trainer, "objective", broken)
    out = tmp_path / "run"
    assert main(options(tiny_neox, text_file, out, "--optimizer.clip-norm", "0")) == 2
    assert f"step {broken_at}: the norm of the gradient is nan" in capsys.readouterr().err
    newest = checkpoint.latest(out / "checkpoint")
    assert newest is not None
    assert newest.name == f"step-{(broken_at - 1) // 4 * 4:08d}"
    assert not (out / "sae").exists()


@pytest.mark.parametrize("tensor", ["sae.W_enc", "optimizer.state.0.exp_avg", "temporal_buffer"])
def test_a_checkpoint_of_numbers_that_are_not_finite_is_never_written(
    tensor: str,
    tiny_neox: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As on a GPU, where only logged steps check their values."""
    real = Trainer.train_step

    def spoiling(self: Trainer, *args: Any, **kwargs: Any) -> dict[str, float]:
        values = real(self, *args, **kwargs)
        if self.step == 8:
            found: Any = self.state_dict()
            for part in tensor.split("."):
                found = found[int(part) if part.isdigit() else part]
            found[(0,) * found.dim()] = float("inf")
        return values

    monkeypatch.setattr(Trainer, "train_step", spoiling)
    out = tmp_path / "run"
    assert main(options(tiny_neox, text_file, out)) == 2
    message = capsys.readouterr().err
    assert f"step 8: {tensor} is not finite" in message
    assert f"the last good checkpoint is {out / 'checkpoint' / 'step-00000004'}" in message
    newest = checkpoint.latest(out / "checkpoint")
    assert newest is not None
    assert newest.name == "step-00000004"


@pytest.fixture
def short_text(text_file: Path, tmp_path: Path) -> Path:
    """Enough for a row of 128 tokens, too short for the first harvest batch."""
    path = tmp_path / "short.txt"
    path.write_text("".join(text_file.read_text().splitlines(keepends=True)[:8]))
    return path


def test_bad_input_that_shows_late_leaves_the_old_run(
    tiny_neox: Path,
    text_file: Path,
    short_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    short = options(tiny_neox, text_file, out, "--steps", "2", "--evaluation.no-final")
    assert main(short) == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert main([*short, "--overwrite", "--data", str(short_text)]) == 2
    message = capsys.readouterr().err
    assert "the text is too short" in message
    assert "Activation buffer" not in message  # found before the run announces itself

    def fail(*args: object, **kwargs: object) -> None:
        raise UserError("no")

    for owner, name in ((Harvester, "batches"), (Trainer, "__init__")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            assert main([*short, "--overwrite"]) == 2
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--layer", "99"], "99"),
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--data", "/no/such/text.txt"], "/no/such/text.txt"),
        (["--data", "nobody/no-such-data"], "nobody/no-such-data"),
        (["--model", "nobody/no-such-model"], "nobody/no-such-model"),
        (["--sae.k", "49"], "sae.k is 49"),
        (["--objective", "slow+fast"], "objective.temporal is 'slow+fast'; it must be none, or any of"),
        (["--sae.d-in", "7"], "sae.d_in is 7"),
        (["--device", "abacus"], "abacus"),
        (["--device", "meta"], "'meta' cannot be used"),
        (["--lm-device", "abacus"], "abacus"),
        (["--lm-device", "cuda:99"], "cuda:99"),
        (
            ["--sparse-step", "on", "--sae.activation", "gelu"],
            "sparse_step is 'on', but sae.activation",
        ),
        (["--cuda-graph", "--device", "cpu"], "cuda_graph is on"),
        (["--objective.l1", "nan"], "objective.l1 is nan"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    more: list[str], words: str, tiny_gemma2: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(options(tiny_gemma2, text_file, out, *more)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert words in errors[0]
    assert not out.exists()


def test_a_place_that_cannot_be_written_is_found_first(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "file", tmp_path / "file" / "sub", Path("/proc/nowhere/run")):
        assert main(options(Path("/no/such/model"), text_file, out)) == 2
        assert f"error: A run cannot be written to {out}" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "precious"


def test_empty_and_short_text_and_missing_columns(
    tiny_gemma2: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("the river ran. " * 5 + "\n\n" + "under a bridge. " * 3)
    (tmp_path / "rows.jsonl").write_text('{"body": "the river ran"}\n{"body": "under"}\n')
    for name, more in (("empty.txt", []), ("short.txt", []), ("rows.jsonl", ["--text.column", "text"])):
        out = tmp_path / "run"
        assert main(options(tiny_gemma2, text_file, out, "--data", str(tmp_path / name), *more)) == 2
        message = capsys.readouterr().err
        assert message.count("error: ") == 1
        assert "Traceback" not in message
        assert not out.exists()
    assert "body" in message


def test_unknown_errors_are_not_swallowed(
    monkeypatch: pytest.MonkeyPatch, tiny_neox: Path, text_file: Path, tmp_path: Path
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Trainer, "train_step", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(options(tiny_neox, text_file, tmp_path / "run"))


def test_user_errors_are_value_errors() -> None:
    assert issubclass(UserError, ValueError)
