"""Home directories: expanded wherever a path is taken, or one sentence."""

from __future__ import annotations

import ast
import dataclasses
import os
import pwd
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from evaluated_run import write_run
from tiny_runs import options, same

import tsae
from tsae.errors import UserError
from tsae.evaluate import main as evaluate
from tsae.export import main as export
from tsae.hub.__main__ import main as publish
from tsae.lm.packaged_models import cache_folder
from tsae.reports.figure import write_report
from tsae.train import command, main
from tsae.training.sweep_file import read_sweep
from tsae.utils import hub
from tsae.utils.paths import expanded, with_expanded_paths
from tsae.view.__main__ import main as view

PACKAGE = Path(tsae.__file__).parent


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory; the working directory beside it must stay empty."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose user the system does not know, as in a container, without HOME."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_home_directories(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert expanded("~") == home
    assert expanded("~/a b") == home / "a b"
    assert expanded("a/~/b") == Path("a/~/b")
    assert expanded(f"{home}/~/b") == home / "~" / "b"  # a folder of this name
    assert expanded("~root/x") == Path(pwd.getpwnam("root").pw_dir) / "x"
    monkeypatch.delenv("HOME")
    assert expanded("~/x") == Path(pwd.getpwuid(os.getuid()).pw_dir) / "x"


@pytest.mark.parametrize("path", ["~no-such-user", "~no-such-user/x", "~~/x"])
def test_the_home_of_nobody(path: str) -> None:
    with pytest.raises(UserError, match=f"^{path} cannot be found, since there is no user '"):
        expanded(path)


def test_no_home(no_home: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = "^~/x cannot be found, since HOME is not set to a folder; set it, or write the whole path.$"
    with pytest.raises(UserError, match=sentence):
        expanded("~/x")
    monkeypatch.setenv("HOME", "")  # else ~/x would be /x
    with pytest.raises(UserError, match=sentence):
        expanded("~/x")
    assert expanded("x") == Path("x")


def test_paths_anywhere_in_a_command_line(home: Path) -> None:
    @dataclasses.dataclass
    class Inner:
        place: Path | None = None

    @dataclasses.dataclass
    class Outer:
        inner: Inner
        several: tuple[Path, ...]
        text: str

    found = with_expanded_paths(Outer(Inner(Path("~/a")), (Path("~/b"), Path("c")), "~/d"))
    assert found == Outer(Inner(home / "a"), (home / "b", Path("c")), "~/d")


@pytest.mark.parametrize("option", ["out", "resume", "config", "sweep"])
def test_options_of_training(option: str, home: Path) -> None:
    if option == "config":
        (home / "x").write_text("{}")
    assert getattr(command([f"--{option}=~/x"])[1], option) == home / "x"


def test_a_run_at_home(
    home: Path, tiny_neox: Path, text_file: Path, blank_report: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Model, text, cache and run are named by their places in the home directory, in options and in a sweep's file."""
    shutil.copytree(tiny_neox, home / "model")
    shutil.copy(text_file, home / "text.txt")
    argv = options(Path("~/model"), Path("~/text.txt"), Path("unused"), "--cache=~/cache", "--steps=2")
    where = argv.index("--out")
    argv[where : where + 2] = ["--out=~/run"]
    assert main(argv) == 0
    assert main(["--resume=~/run"]) == 0
    assert main([*argv, "--config=~/run/config.json", "--overwrite"]) == 0
    base = yaml.safe_load((home / "run" / "config.json").read_text())
    base |= {"model": "~/model", "data": "~/text.txt", "cache": "~/cache"}
    base["text"].pop("threshold")
    (home / "sweep.yaml").write_text(yaml.safe_dump({"base": base, "runs": {"a": {}}}))
    assert main(["--sweep=~/sweep.yaml", "--out=~/sweep"]) == 0
    same(home / "run", home / "sweep" / "a")
    assert main(["--resume=~/sweep"]) == 0
    assert {path.name for path in home.iterdir()} == {"model", "text.txt", "cache", "run", "sweep.yaml", "sweep"}
    assert not list(Path().iterdir())


def test_the_other_commands(home: Path, tiny_gemma3: Path) -> None:
    run = write_run(home / "run", tiny_gemma3)
    data = ["--data=~/text.txt", "--tokens=256"]
    assert evaluate(["~/run"]) == 0
    assert evaluate(["~/run", "--out=~/figures.json", *data]) == 0
    assert evaluate(["~/run/sae", "--model", str(tiny_gemma3), "--layer=1", "--out=~/sae.json", *data]) == 0
    assert view(["~/run", "--out=~/page.html"]) == 0
    assert export(["~/run", "--to=saelens", "--out=~/exported"]) == 0
    assert publish(["~/run", "name", "--folder=~/folder"]) == 0
    for name in ("figures.json", "sae.json", "page.html", "exported/cfg.json", "folder/README.md"):
        assert (home / name).is_file()
    assert tsae.load("~/run").cfg == tsae.SparseAutoencoder.load("~/run/sae").cfg
    tsae.load("~/run").save("~/saved")
    assert (home / "saved" / "cfg.json").is_file()
    assert write_report("~/run") == run / "report.png"
    assert not list(Path().iterdir())


SENTENCE = "error: ~no-such-user/x cannot be found, since there is no user 'no-such-user'; write the whole path."


@pytest.mark.parametrize(
    "argv",
    [
        (main, "--out=~no-such-user/x"),
        (main, "--resume=~no-such-user/x"),
        (main, "--sweep=~no-such-user/x"),
        (main, "--config=~no-such-user/x"),
        (main, "--data=~no-such-user/x"),
        (main, "--model=~no-such-user/x"),
        (main, "--cache=~no-such-user/x"),
        (evaluate, "~no-such-user/x"),
        (evaluate, "~no-such-user/x", "--model=m", "--layer=1"),
        (evaluate, "{run}", "--data=~no-such-user/x"),
        (evaluate, "{run}", "--out=~no-such-user/x"),
        (evaluate, "{run}", "--model=~no-such-user/x"),
        (view, "~no-such-user/x"),
        (export, "~no-such-user/x", "--to=saelens", "--out=x"),
        (publish, "{run}", "name", "--folder=~no-such-user/x"),
    ],
    ids=lambda argv: f"{argv[0].__module__} {argv[1:]}",
)
def test_one_sentence_without_a_home(
    argv: tuple[Callable[[list[str]], int], str],
    home: Path,
    tiny_gemma3: Path,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    call, *words = argv
    run = write_run(home / "run", tiny_gemma3)
    before = sorted(home.rglob("*"))
    words = [word.format(run=run) for word in words]
    if call is main:
        words = [*options(tiny_gemma3, text_file, home / "out"), *words] if words[0][:7] != "--resum" else words
        if words[-1].startswith(("--sweep", "--config")):
            words = words[-1:]
    assert call(words) == 2
    said = capsys.readouterr().err
    assert said.startswith(SENTENCE)
    assert said.count("\n") == 1
    assert sorted(home.rglob("*")) == before
    assert not list(Path().iterdir())


def test_a_sweeps_file_in_nobodys_home(home: Path, tiny_gemma3: Path, text_file: Path) -> None:
    (home / "sweep.yaml").write_text(yaml.safe_dump({"base": {"cache": "~no-such-user/x"}, "runs": {"a": {}}}))
    (cfg,) = read_sweep(home / "sweep.yaml").values()
    assert cfg.cache == "~no-such-user/x"  # `tsae.training.assemble.prepare` expands it, or says the sentence


def test_the_folder_of_models(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TSAE_CACHE", raising=False)
    assert cache_folder("a model", "1 GB") == home / ".cache" / "tsae"
    monkeypatch.setenv("TSAE_CACHE", "~/models")
    assert cache_folder("a model", "1 GB") == home / "models"
    monkeypatch.setenv("TSAE_CACHE", "~no-such-user/models")
    with pytest.raises(UserError, match=r"^TSAE_CACHE: ~no-such-user/models cannot be found"):
        cache_folder("a model", "1 GB")


def test_the_folder_of_models_without_a_home(no_home: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TSAE_CACHE", raising=False)
    with pytest.raises(UserError, match=r"set HOME, or set TSAE_CACHE to a folder with 1 GB of space\.$"):
        cache_folder("a model", "1 GB")


def test_the_hubs_files_go_to_no_folder_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, utils

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "~/.cache/huggingface/hub")  # as without a home
    monkeypatch.setattr(utils, "get_session", lambda: pytest.fail("asked the network"))
    with pytest.raises(UserError, match="set HF_HOME to a folder"):
        hub.hub_is_reachable()


def test_no_module_expands_a_path_by_itself() -> None:
    own = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "paths.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("expanduser", "home")
    ]
    assert not own, "use tsae.utils.paths.expanded, which raises a sentence"
