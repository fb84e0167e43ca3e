"""The demo model, small enough to copy to another machine: `pack` makes it, `unpack` converts it for transformers.

It has the first blocks of Gemma-3-270m as they are quantized, and of its vocabulary what some text of the Python
documentation needs, with all tokens that these are merged from, so that the text tokenizes as with the whole vocabulary
(ids are renumbered). Activations up to the last block kept are those of the whole model; its logits mean nothing.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import tempfile
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy

from tsae.config import TextConfig
from tsae.data.split import Part
from tsae.data.text import open_text
from tsae.lm.gemma_package import GEMMA
from tsae.lm.gguf_file import GGUFFile

TOKENS = 300_000
LAYERS = 10
SHARES: dict[Part, float] = {"train": 0.9, "evaluation": 0.1}
SPECIAL = ("bos", "eos", "padding", "unknown")
KEPT = ("tokens", "token_type", *(f"{name}_token_id" for name in SPECIAL))


def text_of_the_demo(tokenizer: Any, tokens: int) -> tuple[list[str], set[int]]:
    """Documents of at least this many tokens, training text first, and the ids in them."""
    documents: list[str] = []
    used: set[int] = set()
    for part, share in SHARES.items():
        count = 0
        for document in open_text("python-docs", part=part, seed=0, config=TextConfig(), epoch=0):
            ids = tokenizer(document.text, add_special_tokens=False)["input_ids"]
            documents.append(document.text)
            used.update(ids)
            count += len(ids)
            if count > share * tokens:
                break
    return documents, used


def with_merges(used: Iterable[int], tokens: Sequence[str]) -> list[int]:
    """These ids and all that they are merged from, in any way, ascending."""
    index = {token: i for i, token in enumerate(tokens)}
    kept: set[int] = set()
    waiting = list(used)
    while waiting:
        i = waiting.pop()
        if i in kept:
            continue
        kept.add(i)
        token = tokens[i]
        for j in range(1, len(token)):
            left, right = index.get(token[:j]), index.get(token[j:])
            if left is not None and right is not None:
                waiting += [left, right]
    return sorted(kept)


def reduced_metadata(metadata: dict[str, Any], kept: Sequence[int], layers: int) -> dict[str, Any]:
    """The metadata that the conversion reads, with the tokens `kept` under new ids and fewer blocks."""
    new = {old: i for i, old in enumerate(kept)}
    prefix = "tokenizer.ggml."
    out = {name: value for name, value in metadata.items() if name.startswith(("gemma3.", "general.alignment"))}
    out |= {prefix + name: metadata[prefix + name] for name in KEPT}
    for name in ("tokens", "token_type"):
        out[prefix + name] = [metadata[prefix + name][i] for i in kept]
    for name in SPECIAL:
        out[f"{prefix}{name}_token_id"] = new[metadata[f"{prefix}{name}_token_id"]]
    return out | {"gemma3.block_count": layers}


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> tuple[int, bytes]:
    """GGUF's number of the type, and the bytes: bool, int64, float64, string or an array of these."""
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return 11, struct.pack("<q", value)
    if isinstance(value, float):
        return 12, struct.pack("<d", value)
    if isinstance(value, str):
        return 8, _string(value)
    kind = _value(value[0])[0] if value else 11
    return 9, struct.pack("<IQ", kind, len(value)) + b"".join(_value(each)[1] for each in value)


def write_gguf(path: Path, file: GGUFFile, metadata: dict[str, Any], kept: Sequence[int], layers: int) -> None:
    """The first blocks of `file` and the rows `kept` of its embedding, byte for byte."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    head, entries, data, offset = b"", b"", [], 0
    for name, value in metadata.items():
        kind, raw = _value(value)
        head += _string(name) + struct.pack("<I", kind) + raw
    chosen = [e for e in file.tensors if not (e.name.startswith("blk.") and int(e.name.split(".")[1]) >= layers)]
    for entry in chosen:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(entry.kind)]
        count = prod(entry.shape) // block * size
        values = numpy.frombuffer(file._bytes, numpy.uint8, count, file._data + entry.offset)
        shape = tuple(entry.shape)
        if entry.name == "token_embd.weight":
            values = values.reshape(shape[0], -1)[list(kept)].reshape(-1)
            shape = (len(kept), *shape[1:])
        entries += _string(entry.name)
        entries += struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], entry.kind, offset)
        padding = -len(values) % 32
        data += [values.tobytes(), bytes(padding)]
        offset += len(values) + padding
    whole = b"GGUF" + struct.pack("<IQQ", 3, len(chosen), len(metadata)) + head + entries
    path.write_bytes(whole + bytes(-len(whole) % 32) + b"".join(data))


def pack(out: Path, layers: int, tokens: int) -> None:
    """Write `packed.gguf` and `text.jsonl`. Needs the packages of the demo model."""
    from transformers import AutoTokenizer

    out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(GEMMA.folder())
    with tempfile.TemporaryDirectory() as folder:
        file = GGUFFile(GEMMA.unpack(Path(folder) / "whole.gguf"))
        metadata = dict(file.metadata)
        spelled = metadata["tokenizer.ggml.tokens"]
        documents, used = text_of_the_demo(tokenizer, tokens)
        used |= {metadata[f"tokenizer.ggml.{name}_token_id"] for name in SPECIAL}
        used |= {i for i, token in enumerate(spelled) if token.startswith("<0x") and token.endswith(">")}
        kept = with_merges(used, [token.replace(" ", "▁") for token in spelled])
        write_gguf(out / "packed.gguf", file, reduced_metadata(metadata, kept, layers), kept, layers)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (out / "text.jsonl").write_text(lines, encoding="utf-8")
    print(f"{layers} blocks, {len(kept)} of {len(spelled)} tokens")


def unpack(folder: Path, out: Path) -> None:
    """Convert `packed.gguf` in `folder` as the demo model is converted."""
    out.mkdir(parents=True, exist_ok=True)
    GEMMA.save(GGUFFile(folder / "packed.gguf"), out)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.small_model", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="the small model and its text, from the installed demo model")
    packing.add_argument("out", type=Path)
    packing.add_argument("--layers", type=int, default=LAYERS)
    packing.add_argument("--tokens", type=int, default=TOKENS)
    unpacking = commands.add_parser("unpack", help="a folder for transformers")
    unpacking.add_argument("folder", type=Path)
    unpacking.add_argument("out", type=Path)
    chosen = parser.parse_args(arguments)
    if chosen.command == "pack":
        pack(chosen.out, chosen.layers, chosen.tokens)
    else:
        unpack(chosen.folder, chosen.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
