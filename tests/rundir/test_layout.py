"""Names of output files: all in `tsae.rundir.layout`, and all removed by `--overwrite`."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import tsae
from tsae.config import TrainConfig
from tsae.rundir import layout
from tsae.rundir.directory import start_run, start_sweep

PACKAGE = Path(tsae.__file__).parent
# These write outside run directories: models, other formats, caches, checkpoints, an autoencoder's folder.
OWN_FILES = ("rundir/layout.py", "lm/", "formats/", "data/", "sae/saving.py", "training/checkpoint.py")
ELSEWHERE = {"README.md", "cfg.json", "sparsity.safetensors"}  # in a folder for the hub, and in SAELens's format
FILE = re.compile(r"[\w.*-]*\w\.(json|jsonl|html|png|md|pt|safetensors|csv|txt|yaml)")


def test_overwrite_removes_what_any_command_wrote(tmp_path: Path) -> None:
    written = ["probes.json", "saebench_core.json", "eval.json", "eval-release-0.5.json", "view.html", "wandb.json"]
    for name in [*written, "notes.txt", "eval.json.bak"]:
        (tmp_path / name).write_text("{}")
    for name in ("sae", "checkpoint/step-00000001", "tensorboard", "wandb", "my-plots"):
        (tmp_path / name).mkdir(parents=True)
    start_run(tmp_path, TrainConfig())
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "notes.txt", "eval.json.bak", "my-plots"}


def test_overwrite_removes_the_tables_of_another_reproduction(tmp_path: Path) -> None:
    for name in ("results.json", "results.md", "figure1.png"):
        (tmp_path / name).write_text("{}")
    start_sweep({"run": TrainConfig()}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"sweep.json", "run"}
    assert list(json.loads((tmp_path / "sweep.json").read_text())["runs"]) == ["run"]


def test_every_name_of_the_layout_is_removed_or_marks_the_directory() -> None:
    names = {value for name, value in vars(layout).items() if name.isupper() and isinstance(value, str)}
    inside = {name for name in names if "/" in name}  # goes with its folder
    assert names - inside == {*layout.OUTPUTS, layout.CONFIG, layout.SWEEP, layout.LOCK} - {
        "eval-release-*.json",
        "eval-hysteresis-*.json",
        "eval-length-*.json",
    }
    assert all(name.split("/")[0] in layout.OUTPUTS for name in inside)


def test_no_other_module_spells_the_name_of_an_output() -> None:
    spelled = []
    for path in sorted(PACKAGE.rglob("*.py")):
        where = path.relative_to(PACKAGE).as_posix()
        if where.startswith(OWN_FILES):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):  # directory / "name"
                for part in ast.walk(node.right):
                    name = part.value if isinstance(part, ast.Constant) else None
                    if isinstance(name, str) and FILE.fullmatch(name) and name not in ELSEWHERE:
                        spelled.append(f"{where}:{node.lineno}: {name}")
    assert not spelled, "put these names into tsae/rundir/layout.py"
