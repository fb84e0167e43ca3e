"""Every command on chats and on several sources: training, resuming, evaluation, probes, the page, the cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import sample_text
from tiny_runs import Killed, die, options, same, weights
from transformers import AutoTokenizer

import tsae.evaluate
import tsae.probe.__main__
import tsae.view.__main__
from tsae.train import main
from tsae.utils.notices import warn_once

pytestmark = pytest.mark.usefixtures("blank_report")

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}:\n{{ m.content | trim }}{{ eos_token }}\n{% endfor %}"


@pytest.fixture(scope="module")
def chat_model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_llama, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = []
    for i in range(400):
        roles = ("user", "assistant") * (1 + i % 2)
        turns = (("<bos> " if i % 9 == 0 else "") + sample_text(20 + 7 * j, seed=10 * i + j) for j in range(len(roles)))
        rows.append({"messages": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sources(chats: Path, text_file: Path, out: Path) -> dict[str, list[str]]:
    """Options of `--data` by name."""
    mix = out / "mix.yaml"
    mix.write_text(f"- {{data: '{chats}', weight: 1, roles: [assistant]}}\n- {{data: '{text_file}', weight: 2}}\n")
    return {
        "chats": [str(chats), "--text.roles", "assistant"],
        "string": [f"{chats}:0.4,{text_file}:0.6", "--text.max-characters", "900", "--text.min-characters", "20"],
        "yaml": [str(mix)],
    }


@pytest.fixture(scope="module", params=["chats", "string", "yaml"])
def run(
    request: pytest.FixtureRequest,
    chat_model: Path,
    chats: Path,
    text_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, list[str]]:
    """A run, and its arguments."""
    folder = tmp_path_factory.mktemp("run")
    data = sources(chats, text_file, folder)[request.param]
    arguments = options(chat_model, Path("none"), folder / "run", "--data", *data)
    assert main([*arguments, "--cache", str(folder / "cache")]) == 0
    return folder / "run", arguments


def to(arguments: list[str], out: Path) -> list[str]:
    return [*arguments, "--out", str(out)]


def test_the_commands(run: tuple[Path, list[str]], tmp_path: Path, text_file: Path, chats: Path) -> None:
    """The commands read the run's text again, from another directory; another text too."""
    out = shutil.copytree(run[0], tmp_path / "run")
    written = json.loads((out / "eval.json").read_text())
    assert tsae.evaluate.main([str(out)]) == 0
    assert json.loads((out / "eval.json").read_text()) == written
    other = tmp_path / "other.json"
    assert tsae.evaluate.main([str(out), "--data", f"{text_file}:1,{chats}:1", "--out", str(other)]) == 0
    assert json.loads(other.read_text()) != written
    assert tsae.probe.__main__.main([str(out), "--tokens", "2000"]) == 0
    assert json.loads((out / "probes.json").read_text())["text"]["documents"] > 3
    assert tsae.view.__main__.main([str(out)]) == 0
    page = (out / "view.html").read_text()
    assert str(text_file.parent) not in page
    assert "chats.jsonl" in page


def test_a_killed_run_resumes_bitwise(
    run: tuple[Path, list[str]], at_step: Callable[..., None], tmp_path: Path
) -> None:
    at_step(9, die)
    with pytest.raises(Killed):
        main(to(run[1], tmp_path / "run"))
    at_step()
    assert main(["--resume", str(tmp_path / "run")]) == 0
    same(run[0], tmp_path / "run")


@pytest.mark.parametrize("run", ["string"], indirect=True)
def test_the_cache_knows_the_options(run: tuple[Path, list[str]], tmp_path: Path, capfd: Any) -> None:
    """It is the same for the same text, and refused for other roles or lengths."""
    cache = ["--cache", str(run[0].parent / "cache")]
    assert main([*to(run[1], tmp_path / "same"), *cache]) == 0
    same(run[0], tmp_path / "same")
    for i, more in enumerate((["--text.roles", "user"], ["--text.min-characters", "33"])):
        assert main([*to(run[1], tmp_path / f"{i}"), *cache, *more]) == 2
        assert more[0].removeprefix("--").replace("-", "_") in capfd.readouterr().err


@pytest.mark.parametrize("run", ["string"], indirect=True)
def test_the_template_belongs_to_the_cache(
    run: tuple[Path, list[str]], chat_model: Path, tmp_path: Path, capfd: Any
) -> None:
    model = shutil.copytree(chat_model, tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE.replace("role", "role | upper"))
    arguments = [*to(run[1], tmp_path / "run"), "--cache", str(run[0].parent / "cache"), "--model", str(model)]
    assert main(arguments) == 2
    assert "chat_template" in capfd.readouterr().err


def test_the_yaml_may_change_after_the_start(
    chat_model: Path, chats: Path, text_file: Path, at_step: Callable[..., None], tmp_path: Path
) -> None:
    """A run goes on with the mixture it began with."""
    data = sources(chats, text_file, tmp_path)["yaml"]
    arguments = options(chat_model, Path("none"), tmp_path / "run", "--data", *data)
    assert main(to(arguments, tmp_path / "whole")) == 0
    at_step(9, die)
    with pytest.raises(Killed):
        main(arguments)
    at_step()
    (tmp_path / "mix.yaml").write_text(f"- {{data: '{text_file}', weight: 1}}\n")
    assert main(["--resume", str(tmp_path / "run")]) == 0
    same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("tiny_llama", [], "the text holds chats, and the model's tokenizer has no chat template"),
        ("chat_model", ["--text.roles", "asistant"], "text.roles is asistant, and their messages have the roles user"),
        ("chat_model", ["--text.min-characters", "1000000"], "of the length that text.min_characters"),
        ("chat_model", ["--text.max-characters", "1"], "text.max_characters is 1; it must be 0 or at least 2"),
        ("chat_model", ["--text.column", "message"], "no column 'message' in"),
    ],
)
def test_errors_are_one_sentence(
    model: str, more: list[str], message: str, chats: Path, tmp_path: Path, request: pytest.FixtureRequest, capfd: Any
) -> None:
    warn_once.cache_clear()
    folder = request.getfixturevalue(model)
    assert main(options(folder, chats, tmp_path / "run", *more)) == 2
    said = capfd.readouterr().err.splitlines()
    assert message in said[-1]
    assert not any("Traceback" in line for line in said)
    assert not (tmp_path / "run").exists()


def test_roles_change_what_is_trained_on(chat_model: Path, chats: Path, tmp_path: Path) -> None:
    trained = []
    for i, roles in enumerate(([], ["assistant"])):
        more = ["--text.roles", *roles] if roles else []
        assert main(options(chat_model, chats, tmp_path / str(i), "--evaluation.no-final", *more)) == 0
        trained.append(weights(tmp_path / str(i))["W_dec"])
    assert not (trained[0] == trained[1]).all()
