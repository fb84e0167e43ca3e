"""Steps on lists of active features against the same steps with dense features, on a CPU with the eager backend."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tsae.config import ObjectiveConfig, OptimizerConfig, SAEConfig, TrainConfig
from tsae.data.harvest import ActivationBatch
from tsae.errors import UserError
from tsae.sae.normalization import InputNormalizer
from tsae.training import trainer as trainer_module
from tsae.training.sparse_step import dense_reason, uses_lists
from tsae.training.trainer import Trainer
from tsae.utils.device import pretend_to_run_behind

B, T, D, K = 4, 40, 16, 96
CPU = torch.device("cpu")


def config(activation: str = "schmitt", objective: dict[str, Any] | None = None, **options: Any) -> TrainConfig:
    sae = {"d_in": D, "d_sae": K, "k": 6, "activation": activation} | options.pop("sae", {})
    loss = {"temporal": "none", "l1": 0.0, "aux_weight": 0.0, "hold_steps": 0, "ramp_steps": 0} | (objective or {})
    optimizer = {"lr": 0.003, "clip_norm": 0.5} | options.pop("optimizer", {})
    cfg = TrainConfig(
        steps=20,
        batch=B,
        sae=SAEConfig(**sae),
        objective=ObjectiveConfig(**loss),
        optimizer=OptimizerConfig(**optimizer),
        **options,
    )
    cfg.check()
    return cfg


def batches(count: int, length: int = T) -> list[ActivationBatch]:
    generator = torch.Generator().manual_seed(5)
    directions = torch.randn(40, D, generator=generator)
    out = []
    for _ in range(count):
        on = (torch.rand(B, length // 4, 40, generator=generator) < 0.1).float().repeat_interleave(4, 1)
        x = (on * torch.rand(on.shape, generator=generator)) @ directions + 20.0
        segments = (torch.rand(B, length, generator=generator) < 0.1).int().cumsum(1).int()
        segments[torch.rand(B, length, generator=generator) < 0.05] = -1
        out.append(ActivationBatch(x + 0.1 * torch.randn(x.shape, generator=generator), segments))
    return out


def make(cfg: TrainConfig, sparse: bool, *, autocast: bool = False) -> Trainer:
    normalizer = InputNormalizer.estimate(*batches(1)[0])
    cfg = replace(cfg, sparse_step="on" if sparse else "off")
    return Trainer(cfg, normalizer, CPU, autocast=autocast)


def steps(trainer: Trainer, count: int, data: list[ActivationBatch] | None = None) -> list[dict[str, float]]:
    """Steps that read no value of the device but where they log, as all of them do here."""
    with pretend_to_run_behind():
        return [trainer.train_step(batch, log=True) for batch in (data or batches(count))[-count:]]


def check_same(lists: Trainer, dense: Trainer, got: list, wanted: list, rtol: float, atol: float = 1e-7) -> None:
    for step, (one, other) in enumerate(zip(got, wanted, strict=True)):
        assert one.pop("lost_steps") == 0
        one.pop("list_capacity")
        assert set(one) == set(other)
        for name, value in other.items():
            # Adam's first steps are of size lr whatever a gradient's size, so rounding grows where gradients are tiny.
            loose = 30 if "lag1" in name else 10 if name == "gradient_norm" else 1
            assert one[name] == pytest.approx(value, rel=loose * rtol, abs=loose * max(atol, rtol)), (step, name)
    for name, tensor in dense.sae.state_dict().items():
        torch.testing.assert_close(lists.sae.state_dict()[name], tensor, rtol=rtol, atol=max(atol, rtol), msg=name)
    for name, parameter in dense.sae.named_parameters():
        state, other = dense.optimizer.state[parameter], lists.optimizer.state[dict(lists.sae.named_parameters())[name]]
        for key, tensor in state.items():
            top = float(tensor.abs().max())
            torch.testing.assert_close(other[key], tensor, rtol=rtol, atol=rtol * top, msg=f"{name} {key}")
    assert torch.equal(lists.dead.silent, dense.dead.silent)


CASES: dict[str, Callable[[], TrainConfig]] = {
    "topk": lambda: config("topk"),
    "batchtopk, l1": lambda: config("batchtopk", {"l1": 0.05}),
    "schmitt": lambda: config(),
    "schmitt, exact": lambda: config(sae={"steering": "exact"}),
    "rate": lambda: config("rate", {"hold_steps": 1, "ramp_steps": 1}, sae={"release_ratio": 0.5}),
    "gate": lambda: config(sae={"gate_gradient": 0.5}),
    "gate, rate, matryoshka": lambda: config(
        "rate",
        {"hold_steps": 1, "ramp_steps": 2},
        sae={"release_ratio": 0.5, "gate_gradient": 0.3, "groups": (10, 40, K), "encoder_scale": 0.5},
    ),
    "gate, all terms": lambda: config(
        objective={"temporal": "multiscale+window+contrastive+slow", "pairs": 20, "ramp_steps": 3, "l1": 0.02},
        sae={"gate_gradient": 0.4, "bandwidth": 0.3},
    ),
    "the demo's": lambda: config(
        "rate",
        {"temporal": "contrastive+window", "contrastive_weight": 1.5, "hold_steps": 1, "ramp_steps": 2},
        sae={"release_ratio": 0.1, "amplitude_bits": 6.0, "gate_gradient": 0.4, "encoder_scale": 0.5},
    ),
    "gate, AuxK": lambda: config(
        "rate",
        {"aux_weight": 0.5, "dead_after_tokens": 200, "aux_k": 3},
        sae={"k": 1, "encoder_scale": 0.8, "gate_gradient": 0.5, "release_ratio": 0.8, "bandwidth": 0.2},
    ),
    "multiscale": lambda: config(objective={"temporal": "multiscale", "weights": (0.5, 0.2, 0.1), "hold_steps": 1}),
    "multiscale, equal weights, first features": lambda: config(
        "topk", {"temporal": "multiscale", "adaptive": False, "group": 30, "weight": 20.0}
    ),
    "slow": lambda: config(objective={"temporal": "slow", "slow_weight": 0.5, "offset": 3}),
    "window": lambda: config(objective={"temporal": "window", "window": 4, "window_weight": 0.5}),
    "window, first features": lambda: config("topk", {"temporal": "window", "window_weight": 0.5, "group": 50}),
    "contrastive": lambda: config(objective={"temporal": "contrastive", "pairs": 20, "offset": 3}),
    "contrastive, all, other sequences": lambda: config(
        "topk", {"temporal": "contrastive", "pairs": 0, "negatives": "other-sequences", "group": 40}
    ),
    "all terms": lambda: config(
        objective={"temporal": "multiscale+window+contrastive+slow", "pairs": 20, "ramp_steps": 3, "l1": 0.02}
    ),
    "matryoshka": lambda: config("topk", sae={"groups": (10, 40, K)}),
    "AuxK": lambda: config(
        "topk", {"aux_weight": 0.5, "dead_after_tokens": 200, "aux_k": 3}, sae={"k": 1, "encoder_scale": 0.8}
    ),
    "AuxK, more than listed": lambda: config(
        "batchtopk", {"aux_weight": 0.5, "dead_after_tokens": 150, "aux_k": 2}, sae={"k": 1, "encoder_scale": 0.8}
    ),
    "free decoder, adamw": lambda: config(
        "topk",
        sae={"unit_norm_decoder": False, "apply_b_dec_to_input": False},
        optimizer={"name": "adamw", "weight_decay": 0.1, "clip_norm": 0.0},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_lists_make_the_steps_of_dense_features(name: str) -> None:
    cfg = CASES[name]()
    lists, dense = make(cfg, True), make(cfg, False)
    got, wanted = steps(lists, 6), steps(dense, 6)
    if cfg.objective.aux_weight > 0:
        assert wanted[-1]["auxiliary"] > 0
        assert wanted[-1]["dead"] > 2 * cfg.objective.aux_k if "more" in name else wanted[-1]["dead"] > 0
    if cfg.objective.terms:
        assert wanted[-1]["temporal"] > 0
    check_same(lists, dense, got, wanted, rtol=1e-5)


@pytest.mark.parametrize("name", ["topk", "schmitt", "batchtopk, l1", "all terms", "AuxK", "gate, all terms"])
def test_under_autocast_they_agree_as_bfloat16_can(name: str) -> None:
    cfg = replace(CASES[name](), optimizer=OptimizerConfig(lr=1e-3))
    lists, dense = make(cfg, True, autocast=True), make(cfg, False, autocast=True)
    got, wanted = steps(lists, 4), steps(dense, 4)
    for one, other in zip(got, wanted, strict=True):
        for key in ("loss", "reconstruction", "sparsity", "temporal", "l0", "gradient_norm"):
            assert one[key] == pytest.approx(other[key], rel=0.03, abs=1e-3), key
    for key, tensor in dense.sae.state_dict().items():
        if key in ("W_enc", "W_dec", "b_dec"):
            moved = (tensor - make(cfg, False).sae.state_dict()[key]).norm()
            assert (lists.sae.state_dict()[key] - tensor).norm() < 0.25 * moved, key


@pytest.mark.parametrize("name", ["topk", "gate"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_in_pieces(chunk: int, name: str) -> None:
    objective = {"l1": 0.05, "aux_weight": 0.5, "dead_after_tokens": 200, "aux_k": 3}
    options = {"activation": "schmitt", "sae": {"gate_gradient": 0.5}} if name == "gate" else {"activation": "topk"}
    cfg = config(objective=objective, chunk=chunk, **options)
    lists, dense = make(cfg, True), make(cfg, False)
    check_same(lists, dense, steps(lists, 5), steps(dense, 5), rtol=1e-5)


def test_gradient_noise_takes_dense_steps_and_lists_go_on_from_there() -> None:
    cfg = config("topk", optimizer={"noise_eta": 0.01, "noise_steps": 2, "lr": 1e-3})
    lists, dense = make(cfg, True, autocast=True), make(cfg, False, autocast=True)
    got, wanted = steps(lists, 2), steps(dense, 2)
    for key, tensor in dense.sae.state_dict().items():
        assert torch.equal(lists.sae.state_dict()[key], tensor), key
    steps(lists, 2)
    for name in ("W_enc", "W_dec"):
        weight = getattr(lists.sae, name).detach()
        assert torch.equal(lists.lists._half[name], (weight.T if name == "W_enc" else weight).bfloat16())
    assert got[-1]["loss"] == wanted[-1]["loss"]


@pytest.mark.parametrize("halfway", ["lists", "dense"])
def test_a_checkpoint_continues_bit_for_bit_and_from_either_kind_of_step(halfway: str) -> None:
    cfg = CASES["all terms"]()
    data = batches(8)
    whole = make(cfg, halfway == "lists")
    steps(whole, 4, data[:4])
    resumed, other = make(cfg, halfway == "lists"), make(cfg, halfway != "lists")
    for trainer in (resumed, other):
        trainer.load_state_dict(copy.deepcopy(whole.state_dict()))
    for trainer in (whole, resumed, other):
        steps(trainer, 4, data[4:])
    for key, tensor in whole.sae.state_dict().items():
        assert torch.equal(resumed.sae.state_dict()[key], tensor), key
        torch.testing.assert_close(other.sae.state_dict()[key], tensor, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_between_logged_steps_knows_of_dead_features_what_the_run_did() -> None:
    data = batches(8)
    whole, resumed = (make(CASES["AuxK"](), True) for _ in range(2))
    with pretend_to_run_behind():
        for batch in data[:4]:
            whole.train_step(batch)
        assert len(whole.dead.indices(200)) > 0
        resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
        for trainer in (whole, resumed):
            for batch in data[4:]:
                trainer.train_step(batch)
    for key, tensor in whole.sae.state_dict().items():
        assert torch.equal(resumed.sae.state_dict()[key], tensor), key


def test_the_bfloat16_weights_follow_what_is_loaded() -> None:
    trainer, other = make(config(), True, autocast=True), make(config(), True, autocast=True)
    steps(trainer, 1)
    steps(other, 3)
    trainer.load_state_dict(copy.deepcopy(other.state_dict()))
    assert torch.equal(trainer.lists._operand("W_dec"), other.sae.W_dec.detach().bfloat16())
    assert torch.equal(trainer.lists._operand("W_enc"), other.sae.W_enc.detach().T.bfloat16())


@pytest.mark.parametrize("gate", [0.0, 0.4])
def test_a_step_whose_lists_overflow_changes_no_weight_and_the_next_fits(
    gate: float, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = {"temporal": "multiscale", "aux_weight": 0.1, "dead_after_tokens": 100}
    cfg = config(objective=objective, sae={"gate_gradient": gate})
    trainer, dense = make(cfg, True), make(cfg, False)
    trainer.lists.capacity = 4
    before = {name: tensor.clone() for name, tensor in trainer.sae.state_dict().items()}
    first, *later = batches(4)
    with pretend_to_run_behind():
        assert trainer.train_step(first) == {}
        wanted = dense.train_step(first, log=True)
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            assert torch.equal(trainer.sae.state_dict()[name], before[name]), name
        # What does not come from the lists is exact.
        assert torch.equal(trainer.controller.theta, dense.controller.theta)
        assert torch.equal(trainer.dead.silent, dense.dead.silent)
        torch.testing.assert_close(trainer.temporal_buffer.variance, dense.temporal_buffer.variance)
        logged = trainer.train_step(first, log=True)
        assert logged["lost_steps"] == 2
        assert logged["list_capacity"] > wanted["l0"]
        assert "2 steps changed no weight" in " ".join(capsys.readouterr().err.split())
        assert trainer.train_step(later[0], log=True)["lost_steps"] == 0
    assert not torch.equal(trainer.sae.W_enc, before["W_enc"])
    assert all(state["step"] == 1 for state in trainer.optimizer.state.values())


def test_one_crowded_token_does_not_make_the_lists_of_all_as_long() -> None:
    lists = make(config("topk", sae={"d_sae": 4096, "k": 10}), True).lists
    found = []
    for longest in (4000, 4000, 20, 20):
        lists.lost.fill_(longest > lists.capacity)
        lists.most.fill_(longest)
        lists.check()
        found.append(lists.capacity)
    assert found == [64, 256, 32, 32]


@pytest.mark.parametrize("resumed", [False, True])
def test_lists_become_shorter_once_they_are_too_long_for_the_last_steps(resumed: bool) -> None:
    trainer, found = make(config(), True), []
    wanted = trainer.lists.capacity
    trainer.lists.capacity = K
    trainer.lists.most.fill_(K)  # as after a first step with a crowded token
    with pretend_to_run_behind():
        for i, batch in enumerate(batches(18)):
            found.append(trainer.train_step(batch, log=i % 3 == 2).get("list_capacity", K))
            if resumed and i % 5 == 0:
                state, trainer = copy.deepcopy(trainer.state_dict()), make(config(), True)
                trainer.load_state_dict(state)
    assert found[:6] == [K] * 6
    assert found[-1] == wanted < K // 2


def test_excluded_positions_do_not_overflow() -> None:
    """A token that does not count may have any number of active features, and its list any of them."""
    data = batches(3)
    for batch in data:
        batch.segments[0, 7] = -1
        batch.x[0, 7] = 1000.0 * torch.randn(D, generator=torch.Generator().manual_seed(0))
    lists, dense = make(config(), True), make(config(), False)
    with pretend_to_run_behind(), torch.no_grad():
        pre = dense.sae.pre_activation(dense.normalizer(data[0].x[0, 7]))
    assert (pre > 10).sum() > lists.lists.capacity
    check_same(lists, dense, steps(lists, 3, data), steps(dense, 3, data), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"activation": "gelu"}, "has no threshold"),
        ({"activation": "relu"}, "has no threshold"),
        ({"activation": "jumprelu"}, "needs gradients of features that are off"),
        ({"activation": "jumprelu_schmitt"}, "needs gradients of features that are off"),
        ({"activation": "topk", "sae": {"layer_norm": "pre"}}, "layer_norm 'pre'"),
        ({"sae": {"hysteresis": "two-sided"}}, "two-sided"),
    ],
)
def test_what_needs_dense_features_gets_them_or_says_why(options: dict[str, Any], reason: str) -> None:
    cfg = config(**options)
    assert reason in (dense_reason(cfg) or "")
    assert not uses_lists(cfg, torch.device("cuda"))
    with pytest.raises(UserError, match=reason.split("'")[0].strip()):
        make(cfg, True)
    make(cfg, False)


def test_several_processes_have_dense_steps() -> None:
    assert dense_reason(config(), 2) == "there are 2 processes"


def test_by_default_a_cpu_has_dense_steps() -> None:
    assert not uses_lists(config(), CPU)
    assert trainer_module.Trainer(config(), InputNormalizer.identity(D), CPU, autocast=False).lists is None


def test_a_cuda_graph_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="cuda_graph is on, and this run is on cpu"):
        make(replace(config(), cuda_graph=True), True)
