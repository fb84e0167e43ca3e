"""`make gpu-pack`: what is collected, its size, what could not be made; and the small model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_gemma import TOKENS, original_model, write_packed

from tools.gpu import pack, small_model
from tools.gpu.pack import Item
from tsae.lm.gguf_file import GGUFFile

BLOCKS = 2  # of 3


def test_every_package_has_its_version_and_the_project_names_it() -> None:
    names = pack.requirements(pack.WHEELS.read_text())
    assert {"tyro==1.0.17", "gguf==0.19.0", "sae-lens==6.54.12"} <= set(names)
    known = (pack.ROOT / "constraints.txt").read_text().splitlines()
    assert set(names) <= set(known)  # the versions that this release was tested with
    with pytest.raises(ValueError, match="must pin every version with ==, got tyro>=1"):
        pack.requirements("gguf==1  # a comment\ntyro>=1\n")


def test_sizes_stand_beside_the_limit_and_what_is_missing_has_a_reason(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "a.whl").write_bytes(bytes(3 * 2**20))
    (tmp_path / "packed.gguf").write_bytes(bytes(62 * 2**20))
    items = [
        Item("wheels", (tmp_path / "wheels",)),
        Item("compiled libraries", (), "there is no nvcc"),
        Item("small model", (tmp_path / "packed.gguf",)),
    ]
    text = pack.report(items, sources=2**20)
    lines = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in text.splitlines()}
    assert lines["wheels"] == "3.0 MiB"
    assert lines["first copy: all but the small model"] == "4.0 MiB, fits in 64 MiB"
    assert lines["second copy: sources and small model"] == "63.0 MiB, fits in 64 MiB"
    assert lines["both at once"] == "66.0 MiB, TOO LARGE in 64 MiB"
    assert "not made, compiled libraries: there is no nvcc" in text


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch can build the CUDA library")
def test_a_torch_without_cuda_cannot_build_the_library() -> None:
    item = pack.compiled(sys.executable)
    assert item.problem.startswith("the CUDA library is not made: torch ")
    assert "is a build without CUDA" in item.problem
    assert "cannot say" in pack.why_no_cuda("/usr/bin/false")


def test_a_failed_command_is_reported_by_its_last_lines() -> None:
    code = "import sys; print('one'); sys.exit('two\\nthree')"
    assert pack.run(sys.executable, "-c", code) == "two; three"
    assert pack.run(sys.executable, "-c", "raise SystemExit(3)") == "exit code 3"
    assert pack.run(sys.executable, "-c", "print('fine')") == ""


def test_what_a_token_is_merged_from_is_kept() -> None:
    tokens = ["a", "b", "c", "ab", "bc", "abc", "d"]
    assert small_model.with_merges([5], tokens) == [0, 1, 2, 3, 4, 5]
    assert small_model.with_merges([6], tokens) == [6]


def test_the_small_model_has_the_activations_of_the_whole(tmp_path: Path) -> None:
    """With fewer blocks and tokens; ids are renumbered, the text tokenizes into the same strings."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    original = original_model()
    file = GGUFFile(write_packed(original, tmp_path / "whole.gguf"))
    metadata: dict[str, Any] = dict(file.metadata)
    text_tokens = {TOKENS.index(token) for token in ("▁bade", "ba", "de", ".")}
    special = {metadata[f"tokenizer.ggml.{name}_token_id"] for name in small_model.SPECIAL}
    kept = small_model.with_merges(text_tokens | special, TOKENS)
    assert len(kept) < len(TOKENS)
    small_model.write_gguf(
        tmp_path / "packed.gguf", file, small_model.reduced_metadata(metadata, kept, BLOCKS), kept, BLOCKS
    )
    small_model.unpack(tmp_path, tmp_path / "unpacked")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "unpacked")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "unpacked", dtype="float32").eval()
    assert len(model.model.layers) == BLOCKS
    found = tokenizer(" bade bade.", add_special_tokens=False)["input_ids"]
    assert [tokenizer.convert_ids_to_tokens(i) for i in found] == ["▁bade", "▁bade", "."]
    ids = torch.tensor([[kept.index(metadata["tokenizer.ggml.bos_token_id"]), *found]])  # [1, T]
    old = torch.tensor(kept)[ids]
    with torch.no_grad():
        small = model(ids, output_hidden_states=True).hidden_states
        whole = original(old, output_hidden_states=True).hidden_states
    for layer in range(BLOCKS):  # the last entry has the final norm applied
        assert torch.equal(small[layer], whole[layer])


def test_the_text_of_the_small_model_is_both_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    def tokenizer(text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}

    documents, used = small_model.text_of_the_demo(tokenizer, 3000)
    assert sum(len(text.split()) for text in documents) >= 3000
    assert used == {len(word) for text in documents for word in text.split()}
    assert json.dumps(documents)
