"""Damage to the files of a finished run, flipped bits or truncation, is reported with the file's name."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluated_run import write_run
from hypothesis import given, settings
from hypothesis import strategies as st

from tsae import load
from tsae.config import TrainConfig
from tsae.errors import UserError
from tsae.presets import preset
from tsae.rundir import fingerprint as fingerprint_module
from tsae.rundir.directory import check_resumable, read_config
from tsae.rundir.fingerprint import fingerprint
from tsae.sae.model import SparseAutoencoder
from tsae.training.sweep import resume_sweep
from tsae.utils.atomic import checksum_of, write_json
from tsae.utils.config_json import from_dict, load_json, to_dict
from tsae.utils.nested import flatten

flips = st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7))


def damage(path: Path, place: float, bit: int, *, cut: bool) -> None:
    """Flip a bit at, or cut the file to, a share of its length."""
    content = bytearray(path.read_bytes())
    at = int(place * len(content))
    content[at] ^= 1 << bit
    path.write_bytes(content[:at] if cut else content)


@contextmanager
def copy_of(directory: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copytree(directory, Path(folder) / "run"))


@pytest.fixture(scope="module", params=["topk", "schmitt", "jumprelu"])
def run(request: pytest.FixtureRequest, tiny_neox: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_run(tmp_path_factory.mktemp("damage") / "run", tiny_neox, activation=request.param)
    config = read_config(directory)
    sae = SparseAutoencoder.load(directory / "sae")
    sae.save(directory / "sae", model_name="m", hook_layer=1, trained_with=fingerprint(config))
    return directory


def test_no_damage_to_an_autoencoder_goes_unnoticed(run: Path) -> None:
    right = load(run)

    @settings(deadline=None, max_examples=60)
    @given(st.sampled_from(["sae_weights.safetensors", "cfg.json"]), flips, st.booleans())
    def check(name: str, flip: tuple[float, int], cut: bool) -> None:
        with copy_of(run) as copy:
            damage(copy / "sae" / name, *flip, cut=cut)
            with suppress(UserError):
                found = load(copy)
                x = torch.randn(2, 9, right.cfg.d_in, generator=torch.Generator().manual_seed(0))
                assert torch.equal(found.encode(x), right.encode(x))
                assert torch.equal(found(x), right(x))

    check()


def test_no_damage_to_a_configuration_goes_unnoticed(run: Path) -> None:
    right = read_config(run)

    @settings(deadline=None, max_examples=60)
    @given(flips, st.booleans())
    def check(flip: tuple[float, int], cut: bool) -> None:
        with copy_of(run) as copy:
            damage(copy / "config.json", *flip, cut=cut)
            with suppress(UserError):
                found = read_config(copy)
                assert fingerprint(found) == fingerprint(right)

    check()


def test_what_has_changed_is_named(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    write_json(copy / "config.json", load_json(copy / "config.json") | {"layer": 2})
    with pytest.raises(UserError, match=r"config.json is not what the autoencoder beside it was trained with"):
        read_config(copy)
    values = load_json(copy / "sae" / "cfg.json")
    values["metadata"]["tsae"]["k"] = 5
    write_json(copy / "sae" / "cfg.json", values)
    with pytest.raises(UserError, match=r"sae_weights.safetensors is damaged, or metadata.tsae in cfg.json was edited"):
        load(copy)


def test_where_things_lie_may_be_edited(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    moved = {"model": "/elsewhere", "data": "other.txt", "cache": "somewhere", "device": "cpu"}
    write_json(copy / "config.json", load_json(copy / "config.json") | moved)
    assert read_config(copy).model == "/elsewhere"


@pytest.mark.parametrize(
    "values", [7, "x", [], {"metadata": [1]}, {"metadata": {"tsae": 3}}, {"metadata": {"tsae": []}}]
)
def test_a_cfg_of_another_form_is_a_sentence(values: object, run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "sae" / "cfg.json").write_text(json.dumps(values))
    with pytest.raises(UserError):
        load(copy)


@pytest.mark.parametrize(
    "values", [{}, {"runs": []}, {"runs": {"a": 3}}, {"runs": {"a": {}}}, {"runs": {"a": {"config": 1}}}]
)
def test_a_damaged_sweep_is_a_sentence(values: object, tmp_path: Path) -> None:
    write_json(tmp_path / "sweep.json", values)
    with pytest.raises(UserError, match=r"sweep\.json"):
        resume_sweep(tmp_path)


def test_runs_that_are_not_the_checkpoints_are_named(tmp_path: Path) -> None:
    cfg = preset("demo")
    with pytest.raises(UserError, match=r"sweep.json names the runs \['b'\], and the checkpoint there is of \['a'\]"):
        check_resumable({"b": cfg}, {"a": to_dict(cfg)}, tmp_path)
    with pytest.raises(UserError, match=r"sweep.json is not what the run was trained with: steps is"):
        check_resumable({"a": cfg}, {"a": to_dict(cfg) | {"steps": 3}}, tmp_path)
    check_resumable({"": cfg}, {"": to_dict(cfg) | {"model": "elsewhere"}}, tmp_path)


# Fields that the first runs do not have, and other values of them.
NEWER = {
    "buffer.max_norm_ratio": 3.0,
    "evaluation.massive_ratio": 5.0,
    "length": 64,
    "site": "resid_pre",
    "target": "mlp_out",
    "sae.d_out": 8,
    "sae.support_bits": 9.0,
    "sae.amplitude_bits": 1.0,
    "sae.gate_gradient": 0.5,
    "lm_quantization": "8bit",
    "text.roles": ["assistant"],
    "text.min_characters": 3,
    "text.max_characters": 9,
    "text.prepend_bos": "no",
    "sae.initial_decay": 0.25,
}


def without_newer_fields(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration as an older version wrote it."""
    groups = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
    for name in NEWER:
        group, _, field = name.rpartition(".")
        del (groups[group] if group else groups)[field]
    return groups


def test_a_run_of_an_older_version_is_what_it_was(run: Path, tmp_path: Path) -> None:
    """Without the newer fields, or with them at the values that it was trained with."""
    copy = shutil.copytree(run, tmp_path / "run")
    values = load_json(copy / "config.json")
    values["text"]["prepend_bos"] = "auto"  # this version records what it found
    older, editable = without_newer_fields(values), fingerprint_module._EDITABLE
    fixed = flatten({name: value for name, value in older.items() if name not in editable})
    SparseAutoencoder.load(copy / "sae").save(copy / "sae", trained_with=checksum_of(fixed))
    for config in (older, values):
        write_json(copy / "config.json", config)
        found = read_config(copy)
        check_resumable({"": found}, {"": older}, copy)
        check_resumable({"": found}, {"": values}, copy)


@pytest.mark.parametrize(("name", "value"), NEWER.items())
def test_a_newer_field_may_not_be_edited_either(name: str, value: Any, run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    group, _, field = name.rpartition(".")
    values = load_json(copy / "config.json")
    changed = values | ({group: values[group] | {field: value}} if group else {field: value})
    write_json(copy / "config.json", changed)
    with pytest.raises(UserError, match="another fingerprint"):
        read_config(copy)
    for now, then in ((changed, without_newer_fields(values)), (values, changed)):
        with pytest.raises(UserError, match=f"{name} is .* there and was"):
            check_resumable({"": from_dict(TrainConfig, now)}, {"": then}, copy)


def test_every_new_field_leaves_the_fingerprint_of_older_runs_as_it_is() -> None:
    """A new field goes into `fingerprint._ADDED`; then this number is the same."""
    names = fingerprint_module._fixed(to_dict(TrainConfig()))
    assert checksum_of(sorted(names)) == "d8b571de73878b8a07b4154535b717dd"
