"""The activation `persistent`: its recurrence, in evaluation, on disk, and where other code must refuse it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_sae import D_IN, D_SAE, make
from torch import Tensor

from tsae.config import ObjectiveConfig, OptimizerConfig, SAEConfig, TrainConfig
from tsae.data.harvest import ActivationBatch
from tsae.errors import UserError
from tsae.formats.forms import common_architecture
from tsae.sae.model import SparseAutoencoder
from tsae.sae.normalization import InputNormalizer
from tsae.sae.recurrence import LARGEST_DECAY, decay_of, logit_of
from tsae.sae.release import with_release_ratio
from tsae.training.init_from import check_fits, warm_start
from tsae.training.sparse_step import dense_reason
from tsae.training.trainer import Trainer
from tsae.view.data import thresholds

B, T = 3, 11
SEGMENTS = torch.tensor([[0] * 11, [0] * 4 + [1] * 7, [2, 2, -1, 2, 2, 3, -1, -1, 3, 3, 3]])


def defined(a: Tensor, decay: Tensor, segments: Tensor | None) -> Tensor:
    """Position by position."""
    rows = []
    for b in range(a.shape[0]):
        state, row = torch.zeros_like(a[0, 0]), []
        for t in range(a.shape[1]):
            here = 0 if segments is None else int(segments[b, t])
            before = None if t == 0 else (0 if segments is None else int(segments[b, t - 1]))
            state = decay * (state if here == before else torch.zeros_like(state)) + (1 - decay) * a[b, t]
            state = state * (here >= 0)
            row.append(state)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def test_decays_survive_their_parameters() -> None:
    decay = torch.tensor([0.01, 0.5, 0.99])
    torch.testing.assert_close(decay_of(logit_of(decay)), decay)
    assert float(decay_of(torch.tensor(100.0))) == pytest.approx(LARGEST_DECAY)
    assert logit_of(torch.tensor([0.0, LARGEST_DECAY])).isfinite().all()


def persistent(**options: Any) -> SparseAutoencoder:
    sae = make(activation="persistent", **options)
    with torch.no_grad():
        sae.decay.copy_(torch.linspace(0.0, 0.99, D_SAE))
        sae.update_threshold_parameters()
    return sae


def inputs() -> Tensor:
    return torch.randn(B, T, D_IN, generator=torch.Generator().manual_seed(3))


def test_features_are_those_of_batchtopk_through_the_recurrence() -> None:
    sae, plain = persistent(), make(activation="batchtopk")
    h = sae.encode(inputs(), SEGMENTS)
    torch.testing.assert_close(h, defined(plain.encode(inputs(), SEGMENTS), sae.decay, SEGMENTS))
    alone = sae.encode(inputs()[1:2, 4:])  # a segment by itself
    torch.testing.assert_close(h[1:2, 4:], alone)
    both = sae.train().encode(inputs(), SEGMENTS)  # the threshold of the batch, the decay of the parameters
    assert both.shape == h.shape


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    sae = persistent()
    sae.save(tmp_path)
    loaded = SparseAutoencoder.load(tmp_path)
    assert torch.equal(loaded.encode(inputs(), SEGMENTS), sae.encode(inputs(), SEGMENTS))
    assert torch.equal(loaded.decay, sae.decay)
    assert json.loads((tmp_path / "cfg.json").read_text())["architecture"] == "tsae_persistent"
    path = tmp_path / "sae_weights.safetensors"
    tensors = load_file(path)
    tensors["decay"][0] = 1.5
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"decay must be from 0 to 0\.999"):
        SparseAutoencoder.load(tmp_path)


def test_training_moves_decays_and_ends_with_them() -> None:
    cfg = TrainConfig(
        steps=20,
        batch=4,
        sae=SAEConfig(d_in=D_IN, d_sae=D_SAE, k=5, activation="persistent", initial_decay=0.3),
        objective=ObjectiveConfig(temporal="none", l1=0.0, boost=1.0),
        optimizer=OptimizerConfig(lr=0.02, name="adamw"),
    )
    cfg.check()
    trainer = Trainer(cfg, InputNormalizer.identity(D_IN), torch.device("cpu"), autocast=False)
    x = torch.randn(4, 1, D_IN, generator=torch.Generator().manual_seed(0)).expand(4, 24, D_IN)  # constant in time
    logs = [trainer.train_step(ActivationBatch(x, torch.zeros(4, 24, dtype=torch.int32)), log=True) for _ in range(20)]
    assert logs[-1]["reconstruction"] < 0.5 * logs[0]["reconstruction"]
    finished = trainer.finished()
    torch.testing.assert_close(finished.decay, decay_of(trainer.sae.decay_logit))  # type: ignore[arg-type]
    assert float((finished.decay - 0.3).abs().max()) > 0.01
    groups = trainer.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    assert groups[1]["params"] == [trainer.sae.decay_logit]


def test_a_run_starts_from_one_with_its_decays() -> None:
    source = persistent(apply_b_dec_to_input=True)
    cfg = TrainConfig(sae=SAEConfig(d_in=D_IN, d_sae=D_SAE, k=5, activation="persistent"), init_from="there")
    sae = warm_start(cfg, source, InputNormalizer.identity(D_IN)).sae.eval()
    torch.testing.assert_close(sae.encode(inputs(), SEGMENTS), source.encode(inputs(), SEGMENTS))
    cfg.sae.activation = "batchtopk"
    with pytest.raises(UserError, match=r"whose features are a recurrence along the sequence; leave sae\.activation"):
        check_fits(cfg, source)


def test_what_needs_plain_thresholds_refuses_it() -> None:
    sae = persistent()
    with pytest.raises(UserError, match="SAELens has no equivalent of the activation persistent"):
        common_architecture(sae, "SAELens")
    with pytest.raises(UserError, match="needs one with thresholds"):
        with_release_ratio(sae, 0.4, [])
    assert thresholds(sae) == (None, None)
    assert "stay active along the sequence" in str(dense_reason(TrainConfig(sae=sae.cfg)))
    with pytest.raises(UserError, match=r"sae\.layer_norm is 'post'"):
        SAEConfig(activation="persistent", layer_norm="post").check()
    with pytest.raises(UserError, match=r"sae\.initial_decay"):
        SAEConfig(activation="persistent", initial_decay=0.999).check()
