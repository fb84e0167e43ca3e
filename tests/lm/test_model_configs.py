"""config.json changed field by field: the model computes what it did, or what the field means, or one sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import outcome, save_family

# Where another value, or the default, means another model, and the weights do not tell which is right.
MEANT = {
    *("layer_norm_epsilon", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "hidden_act"),
    *("scale_attn_by_inverse_layer_idx", "scale_attn_weights", "reorder_and_upcast_attn", "_remove_final_layer_norm"),
    *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "sliding_window", "n_head"),
    *("apply_residual_connection_post_layernorm", "use_parallel_residual", "rope_parameters", "layer_types"),
    *("use_sliding_window", "max_window_layers", "sliding_window_pattern", "is_decoder", "alibi", "parallel_attn"),
    *("qk_layernorm", "use_bidirectional_attention", "partial_rotary_factor", "rotary_pct", "num_kv_heads"),
}


def changes(config: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for name, value in config.items():
        yield name, "dropped", {key: other for key, other in config.items() if key != name}
        for other in (None, "x", [], {}, -1, 0.5, True):
            if other != value or type(other) is not type(value):
                yield name, repr(other), config | {name: other}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "neox", "llama", "qwen2", "gemma2", "gemma3", "opt", "bloom", "phi"])
def test_every_field_and_type(family: str, tmp_path: Path) -> None:
    folder = save_family(tmp_path, family)
    path = folder / "config.json"
    expected, config = outcome(folder), json.loads(path.read_text())
    assert not isinstance(expected, str)
    refused = 0
    for name, what, changed in changes(config):
        path.write_text(json.dumps(changed))
        found = outcome(folder)
        if isinstance(found, str):
            assert "\n" not in found
            assert len(found) < 700
            refused += 1
        elif name not in MEANT:
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (name, what)
    assert refused > 30


@pytest.mark.parametrize(
    "field", ["n_layer", "n_embd", "n_head", "n_positions", "vocab_size", "activation_function", "model_type"]
)
def test_what_gpt2_is_built_of(field: str, tmp_path: Path) -> None:
    """The same in little, of the fields that matter most."""
    folder = save_family(tmp_path, "gpt2")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for value in (None, "x", [], -1, 0.5, 7):
        path.write_text(json.dumps(config | {field: value}))
        found = outcome(folder)
        if isinstance(found, tuple):
            assert (field, value) == ("n_head", None), value


def test_fields_that_no_class_knows(tmp_path: Path) -> None:
    folder = save_family(tmp_path, "llama")
    path = folder / "config.json"
    expected = outcome(folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"nonsense": {"a": [1]}, "d_modell": 7}))
    assert all(map(torch.equal, outcome(folder), expected))
