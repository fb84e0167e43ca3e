"""The cache's files: shards and manifest, what is refused, and which damage is detected."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import event, given, settings
from hypothesis import strategies as st

import tsae.data.cache
from tsae.data.cache import ActivationCache, sequence_bytes
from tsae.data.harvest import ActivationBatch
from tsae.data.sequences import TokenBatch
from tsae.errors import UserError
from tsae.utils.atomic import checksum_of

G, T, D = 2, 5, 3


def group(number: int) -> tuple[TokenBatch, ActivationBatch]:
    tokens = torch.arange(G * (T + 1)).reshape(G, T + 1) + 100 * number
    segments = torch.zeros(G, T, dtype=torch.int32)
    return TokenBatch(tokens, segments), ActivationBatch(torch.randn(G, T, D).bfloat16(), segments)


def opened(directory: Path, **request: Any) -> ActivationCache:
    return ActivationCache(directory, {"layer": 1, "model": "m"} | request, {"torch": "x"}, group=G)


def filled(directory: Path, groups: int, flush_every: int) -> list[tuple[TokenBatch, ActivationBatch]]:
    made = [group(i) for i in range(groups)]
    with opened(directory) as cache:
        for i, (tokens, harvest) in enumerate(made):
            cache.append(tokens, harvest, {"at": i + 1})
            if i % flush_every == flush_every - 1:
                cache.flush()
        cache.flush()
    return made


def test_groups_are_read_back_bit_for_bit(tmp_path: Path) -> None:
    made = filled(tmp_path / "cache", 7, 3)
    cache = opened(tmp_path / "cache")
    assert (cache.groups, cache.shards) == (7, 3)
    assert [cache.span(shard) for shard in range(3)] == [(0, 3), (3, 6), (6, 7)]
    assert [cache.stream_after(shard) for shard in range(3)] == [{"at": 3}, {"at": 6}, {"at": 7}]
    for number in (4, 0, 6, 5):
        assert cache.is_intact(cache.shard_of(number))
        tokens, harvest = cache.read(number)
        assert tokens.equals(made[number][0])
        assert torch.equal(harvest.x, made[number][1].x)
        assert harvest.x.dtype == torch.bfloat16
    assert sequence_bytes(T, D, torch.bfloat16) == T * D * 2 + T * 4 + (T + 1) * 4


def test_a_full_shard_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tsae.data.cache, "SHARD_BYTES", 2 * G * T * D * 2)
    with opened(tmp_path / "cache") as cache:
        for i in range(5):
            cache.append(*group(i), {})
        assert cache.groups == 4


def test_opening_writes_nothing(tmp_path: Path) -> None:
    assert opened(tmp_path / "cache").groups == 0
    assert list(tmp_path.iterdir()) == []


def test_a_difference_is_named_with_both_values(tmp_path: Path) -> None:
    filled(tmp_path / "cache", 1, 1)
    with pytest.raises(UserError, match="layer is 1 there and 2 here, model is 'm' there and None here"):
        opened(tmp_path / "cache", layer=2, model=None)


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty and holds no cache"):
        opened(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        opened(tmp_path / "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("where", [0, 100, -1])
def test_any_flipped_bit_of_a_shard_is_found(where: int, tmp_path: Path) -> None:
    filled(tmp_path / "cache", 2, 1)
    path = opened(tmp_path / "cache").path(1)
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    cache = opened(tmp_path / "cache")
    assert (cache.is_intact(0), cache.is_intact(1)) == (True, False)
    path.write_bytes(data[:-3])
    assert not opened(tmp_path / "cache").is_intact(1)
    path.unlink()
    assert not opened(tmp_path / "cache").is_intact(1)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_damage_is_refused_or_detected_or_harmless(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = filled(Path(folder), 4, 2)
        opened(Path(folder)).close()
        file = data.draw(st.sampled_from(sorted(Path(folder).iterdir())), label="file")
        content = bytearray(file.read_bytes())
        if data.draw(st.booleans(), label="cut") or not content:
            file.write_bytes(content[: data.draw(st.integers(0, max(len(content) - 1, 0)), label="to")])
        else:
            for _ in range(data.draw(st.integers(1, 3), label="flips")):
                content[data.draw(st.integers(0, len(content) - 1), label="byte")] ^= 1 << data.draw(st.integers(0, 7))
            file.write_bytes(content)
        try:
            cache = opened(Path(folder))
        except UserError:
            event("refused")
            assert file.name == "manifest.json"
            return
        intact = [number for number in range(4) if cache.is_intact(cache.shard_of(number))]
        event(f"{len(intact)} groups are intact")
        assert file.name != "manifest.json" or len(intact) == 4
        for number in intact:
            tokens, harvest = cache.read(number)
            assert tokens.equals(made[number][0])
            assert torch.equal(harvest.x, made[number][1].x)


def test_a_changed_number_of_sequences_does_not_shift_later_shards(tmp_path: Path) -> None:
    filled(tmp_path, 6, 2)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"sequences": 4', '"sequences": 6', 1))
    with pytest.raises(UserError, match="it is damaged: its checksum does not match"):
        opened(tmp_path)


def test_a_shard_removed_while_reading_is_one_sentence(tmp_path: Path) -> None:
    filled(tmp_path, 2, 1)
    cache = opened(tmp_path)
    assert cache.is_intact(1)
    cache.path(1).unlink()
    with pytest.raises(UserError, match=r"shard-000001\.safetensors cannot be read any more"):
        cache.read(1)


def test_a_damaged_manifest_is_one_sentence(tmp_path: Path) -> None:
    filled(tmp_path / "cache", 2, 1)
    path = tmp_path / "cache" / "manifest.json"
    good = path.read_text()
    values = json.loads(good)
    shard = values["shards"][0]

    def signed(**change: Any) -> str:
        rest = {key: value for key, value in (values | change).items() if key != "checksum"}
        return json.dumps(rest | {"checksum": checksum_of(rest)})

    path.write_text(signed())
    assert opened(tmp_path / "cache").groups == 2
    for bad in (
        good[:-20],
        "[]",
        "7",
        "\0",
        signed(shards=3),
        signed(shards=[shard | {"bytes": "many"}]),
        signed(shards=[{"sequences": 2}]),
        signed(shards=[shard | {"sequences": -2}]),
        json.dumps({"format": 2}),
        json.dumps({key: value for key, value in values.items() if key != "checksum"}),
        json.dumps(values | {"format": 1}),
    ):
        path.write_text(bad)
        with pytest.raises(UserError, match="cannot be read"):
            opened(tmp_path / "cache")


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    filled(tmp_path / "cache", 1, 1)
    with FileLock(tmp_path / "cache" / "lock"):
        cache = opened(tmp_path / "cache")
        assert cache.read(0)
        with pytest.raises(UserError, match="is being written by another process"):
            cache.append(*group(1), {})
    cache = opened(tmp_path / "cache")
    cache.append(*group(1), {})
    cache.flush()
    cache.close()
    assert opened(tmp_path / "cache").groups == 2


def test_leftovers_of_a_killed_writer_are_overwritten(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    filled(directory, 2, 1)
    orphan = opened(directory).path(2)
    orphan.write_bytes(b"whole, but not in the manifest yet")
    orphan.with_name(f".{orphan.name}.tmp").write_bytes(b"half")
    assert opened(directory).groups == 2
    with opened(directory) as cache:
        cache.append(*group(2), {})
        cache.flush()
    cache = opened(directory)
    assert (cache.groups, cache.is_intact(2)) == (3, True)
    assert not list(directory.glob(".*.tmp"))
