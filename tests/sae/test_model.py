"""The autoencoder: activations, folding of the input normalization, saving."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_sae import D_IN, D_SAE, make

import tsae
from tsae.errors import UserError
from tsae.sae.kinds import KINDS
from tsae.sae.model import SparseAutoencoder
from tsae.sae.normalization import InputNormalizer

B, T = 3, 17


def activations(seed: int = 2) -> torch.Tensor:
    return torch.randn(B, T, D_IN, generator=torch.Generator().manual_seed(seed))


SEGMENTS = torch.tensor([[0] * 9 + [1] * 8, [0] * 17, [0] * 5 + [-1] + [2] * 11])


def plain_pre(sae: SparseAutoencoder, x: torch.Tensor) -> torch.Tensor:
    return (x - sae.b_dec) @ sae.W_enc + sae.b_enc


def test_relu_and_gelu_are_the_textbook_encoder() -> None:
    x = activations()
    for kind, function in (("relu", torch.relu), ("gelu", torch.nn.functional.gelu)):
        sae = make(activation=kind)
        torch.testing.assert_close(sae.encode(x), function(plain_pre(sae, x)))
        torch.testing.assert_close(sae(x), sae.encode(x) @ sae.W_dec + sae.b_dec)


def test_topk_keeps_exactly_the_k_largest() -> None:
    sae, x = make(activation="topk"), activations() + 3.0
    pre = plain_pre(sae, x)
    values, indices = pre.topk(5, -1)
    expected = torch.zeros_like(pre).scatter(-1, indices, values.relu())
    torch.testing.assert_close(sae.encode(x), expected)


def test_batchtopk_keeps_k_per_token_of_the_batch_and_uses_its_running_threshold_in_eval() -> None:
    sae, x = make(activation="batchtopk").train(), activations()
    sae.threshold.zero_()
    h = sae.encode(x, SEGMENTS)
    kept = SEGMENTS >= 0
    assert int((h[kept] > 0).sum()) == 5 * int(kept.sum())
    assert float(sae.threshold[0]) == pytest.approx(
        float(plain_pre(sae, x)[kept].detach().flatten().sort().values[-5 * 50 - 1])
    )
    torch.testing.assert_close(sae.eval().encode(x)[kept], h[kept])
    sae.threshold.fill_(1e9)
    assert sae.encode(x).abs().sum() == 0


def test_schmitt_is_a_trigger_along_the_sequence() -> None:
    sae, x = make(activation="schmitt"), activations()
    pre = plain_pre(sae, x)
    expected = torch.zeros_like(pre)
    for b in range(B):
        for j in range(D_SAE):
            on = False
            for t in range(T):
                same = t > 0 and SEGMENTS[b, t] == SEGMENTS[b, t - 1] and SEGMENTS[b, t] >= 0
                on = bool(pre[b, t, j] > 0.6) or (on and same and bool(pre[b, t, j] > 0.2))
                expected[b, t, j] = pre[b, t, j] if on else 0.0
    h = sae.encode(x, SEGMENTS)
    torch.testing.assert_close(h, expected)
    assert (h > 0).sum() > (pre > 0.6).sum()  # hysteresis held some features on
    assert not torch.equal(h, sae.encode(x))  # and segments reset it


def test_layer_norm_before_and_after_the_nonlinearity() -> None:
    x = activations()
    pre_sae, post_sae = make(activation="relu", layer_norm="pre"), make(activation="relu", layer_norm="post")
    norm = torch.nn.functional.layer_norm
    torch.testing.assert_close(pre_sae.encode(x), torch.relu(norm(plain_pre(pre_sae, x), (D_SAE,))))
    torch.testing.assert_close(post_sae.encode(x), norm(torch.relu(plain_pre(post_sae, x)), (D_SAE,)))


@pytest.mark.parametrize("shape", [(D_IN,), (T, D_IN), (2, B, T, D_IN)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    sae = make(activation="schmitt")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    h = sae.encode(x)
    assert h.shape == (*shape[:-1], D_SAE)
    assert sae(x).shape == shape
    rows = x.reshape(-1, shape[-2] if len(shape) > 1 else 1, D_IN)
    torch.testing.assert_close(
        h.reshape(-1, *h.shape[-2:])[0] if len(shape) > 1 else h, sae.encode(rows[:1])[0].squeeze(0)
    )


def test_width_mismatch_is_named() -> None:
    with pytest.raises(UserError, match="is 7; this autoencoder takes 12"):
        make().encode(torch.zeros(2, 7))


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "relu"},
        {"activation": "topk"},
        {"activation": "batchtopk"},
        {"activation": "schmitt"},
        {"activation": "schmitt", "apply_b_dec_to_input": False},
        {"activation": "jumprelu"},
        {"activation": "jumprelu_schmitt"},
        {"activation": "persistent"},
        {"activation": "gelu"},
        {"activation": "gelu", "apply_b_dec_to_input": False},
        {"activation": "relu", "layer_norm": "pre"},
        {"activation": "relu", "layer_norm": "post"},
    ],
)
def test_folding_gives_the_same_autoencoder_on_raw_activations(options: dict[str, object], tmp_path: Path) -> None:
    sae = make(**options)
    mean, scale = torch.full((D_IN,), 600.0), 25.0
    x = activations()
    raw = x * scale + mean
    folded = sae.folded(mean, scale)
    h, reference = folded.encode(raw, SEGMENTS), sae.encode(x, SEGMENTS)
    homogeneous = options["activation"] != "gelu" and "layer_norm" not in options
    torch.testing.assert_close(h, reference * (scale if homogeneous else 1.0), rtol=1e-3, atol=1e-3 * scale)
    assert torch.equal(h > 0, reference > 0)
    torch.testing.assert_close(folded(raw, SEGMENTS), sae(x, SEGMENTS) * scale + mean, rtol=1e-5, atol=1e-2)
    assert torch.equal(folded.W_enc, sae.W_enc)
    assert torch.equal(folded.W_dec, sae.W_dec)

    folded.save(tmp_path / "sae", model_name="m")
    loaded = SparseAutoencoder.load(tmp_path / "sae")
    assert loaded.cfg == folded.cfg
    assert torch.equal(loaded.encode(raw, SEGMENTS), h)
    assert not loaded.training


def test_saved_directory_is_saelens_format(tmp_path: Path) -> None:
    make(activation="topk").save(tmp_path / "topk", model_name="m", hook_name="blocks.1.hook_resid_post")
    values = json.loads((tmp_path / "topk" / "cfg.json").read_text())
    assert values["architecture"] == "topk"
    assert values["k"] == 5
    assert (values["d_in"], values["d_sae"], values["dtype"]) == (D_IN, D_SAE, "float32")
    assert values["normalize_activations"] == values["reshape_activations"] == "none"
    assert values["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
    assert int(values["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    weights = load_file(tmp_path / "topk" / "sae_weights.safetensors")
    assert {k: tuple(v.shape) for k, v in weights.items()} == {
        "W_enc": (D_IN, D_SAE),
        "b_enc": (D_SAE,),
        "W_dec": (D_SAE, D_IN),
        "b_dec": (D_IN,),
    }
    make(activation="batchtopk").save(tmp_path / "batchtopk")
    assert json.loads((tmp_path / "batchtopk" / "cfg.json").read_text())["architecture"] == "jumprelu"
    assert load_file(tmp_path / "batchtopk" / "sae_weights.safetensors")["threshold"].shape == (D_SAE,)
    make(activation="schmitt").save(tmp_path / "schmitt")  # SAELens must not take it for one of its own
    assert json.loads((tmp_path / "schmitt" / "cfg.json").read_text())["architecture"] == "tsae_schmitt"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("activation", ["jumprelu", "jumprelu_schmitt"])
def test_learned_thresholds_are_saved_as_thresholds(activation: str, training: bool, tmp_path: Path) -> None:
    sae, x = make(activation=activation, groups=(10, D_SAE)), activations()
    sae.threshold.mul_(torch.linspace(0.5, 1.5, D_SAE))
    if activation == "jumprelu_schmitt":
        sae.release.copy_(sae.threshold * torch.linspace(0.2, 0.9, D_SAE))
    sae.update_threshold_parameters()
    assert sae.log_threshold is not None
    h = sae.encode(x, SEGMENTS)
    if training:  # in training the parameters count, and buffers may be stale
        sae.train().threshold.zero_()
    sae.save(tmp_path)
    values = json.loads((tmp_path / "cfg.json").read_text())
    assert values["architecture"] == ("jumprelu" if activation == "jumprelu" else "tsae_jumprelu_schmitt")
    names = {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
    weights = load_file(tmp_path / "sae_weights.safetensors")
    assert set(weights) == (names if activation == "jumprelu" else names | {"release"})
    torch.testing.assert_close(weights["threshold"], sae.log_threshold.detach().exp())
    loaded = SparseAutoencoder.load(tmp_path)
    assert loaded.cfg == sae.cfg
    torch.testing.assert_close(loaded.encode(x, SEGMENTS), h)
    torch.testing.assert_close(loaded.train().encode(x, SEGMENTS), h)  # training can continue


@pytest.mark.parametrize("activation", KINDS)
def test_matryoshka_prefixes_are_decodes_of_the_first_features(activation: str) -> None:
    sae = make(activation=activation, groups=(7, 20, D_SAE), input_scale=2.0).train()
    sae.update_threshold_parameters()
    h = sae.encode(activations(), SEGMENTS).detach().requires_grad_()
    prefixes = sae.decode_prefixes(h)
    assert len(prefixes) == 3
    expected = []
    for size, prefix in zip((7, 20, D_SAE), prefixes, strict=True):
        expected.append(2.0 * (h[..., :size] @ sae.W_dec[:size]) + sae.b_dec)
        torch.testing.assert_close(prefix, expected[-1])
    torch.testing.assert_close(prefixes[-1], sae.decode(h))
    weights = torch.randn(3, D_IN, generator=torch.Generator().manual_seed(0))
    inputs = (h, sae.W_dec, sae.b_dec)
    got = torch.autograd.grad(sum((p.sin() @ w).sum() for p, w in zip(prefixes, weights, strict=True)), inputs)
    wanted = torch.autograd.grad(sum((p.sin() @ w).sum() for p, w in zip(expected, weights, strict=True)), inputs)
    # The sparse product skips the gradient of features that are 0 if their nonlinearity passes none.
    kind = KINDS[activation]
    counted = (h != 0) if kind.k_sparse and not kind.learned else torch.ones_like(h)
    torch.testing.assert_close(got[0] * counted, wanted[0] * counted)
    for a, b in zip(got[1:], wanted[1:], strict=True):
        torch.testing.assert_close(a, b)


def test_a_saelens_directory_without_our_metadata_is_left_to_tsae_load(tmp_path: Path) -> None:
    sae = make(activation="batchtopk")
    sae.save(tmp_path)
    values = json.loads((tmp_path / "cfg.json").read_text())
    del values["metadata"]["tsae"]
    (tmp_path / "cfg.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"was not written by tsae .* read it with tsae\.load"):
        SparseAutoencoder.load(tmp_path)
    loaded = tsae.load(tmp_path)
    assert loaded.cfg.activation == "jumprelu"
    torch.testing.assert_close(loaded.encode(activations()), sae.encode(activations()))


def test_bad_directories_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no cfg\.json"):
        SparseAutoencoder.load(tmp_path)
    make().save(tmp_path)
    values = json.loads((tmp_path / "cfg.json").read_text())
    values["metadata"]["tsae"]["d_sae"] = 41
    (tmp_path / "cfg.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"W_enc has the shape \(12, 40\); expected \(12, 41\)"):
        SparseAutoencoder.load(tmp_path)
    (tmp_path / "sae_weights.safetensors").write_bytes(b"\0" * 50)
    with pytest.raises(UserError, match="damaged"):
        SparseAutoencoder.load(tmp_path)
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        SparseAutoencoder.load(tmp_path)


def test_xavier_initialization_and_unit_norm_rows() -> None:
    sae = make(init="xavier", unit_norm_decoder=False)
    bound = (6 / (D_IN + D_SAE)) ** 0.5
    for weight in (sae.W_enc, sae.W_dec):
        assert weight.abs().max() <= bound
        assert weight.abs().max() > 0.9 * bound
        assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.1)
    assert not torch.equal(sae.W_enc, sae.W_dec.T)
    unit = make(init="xavier", unit_norm_decoder=True)
    torch.testing.assert_close(unit.W_dec.norm(dim=1), torch.ones(D_SAE))
    tied = make(init="tied")
    torch.testing.assert_close(tied.W_enc, tied.W_dec.T)
    torch.testing.assert_close(make(encoder_scale=0.25).W_enc, 0.25 * tied.W_dec.T)
    torch.testing.assert_close(tied.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_normalizer_is_accurate_for_a_mean_a_thousand_times_the_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, T, D_IN, generator=generator) * 3.0 + 6000.0
    segments = torch.zeros(6, T, dtype=torch.int32)
    segments[:, 0] = -1
    x[:, 0] = 1e5  # excluded
    normalizer = InputNormalizer.estimate(x, segments)
    kept = x[segments >= 0].double()
    torch.testing.assert_close(normalizer.mean.double(), kept.mean(0), rtol=1e-7, atol=0)
    assert normalizer.scale == pytest.approx(float((kept - kept.mean(0)).square().mean().sqrt()), rel=1e-6)
    out = normalizer(x)[segments >= 0]
    assert float(out.square().sum(-1).mean()) == pytest.approx(D_IN, rel=1e-4)


def test_normalizer_weighs_tokens_equally_however_many_a_row_has() -> None:
    """The last rows of a text have few content tokens; here every row is about another thing."""
    x = torch.randn(5, T, D_IN) + 100.0 * torch.arange(5.0)[:, None, None]
    segments = torch.zeros(5, T, dtype=torch.int32)
    segments[1, 1:] = segments[3, 2:] = segments[4] = -1
    kept = x[segments >= 0].double()
    assert (kept.mean(0) - x.double().mean((0, 1))).abs().min() > 20
    normalizer = InputNormalizer.estimate(x, segments)
    torch.testing.assert_close(normalizer.mean.double(), kept.mean(0), rtol=1e-6, atol=0)
    assert normalizer.scale == pytest.approx(float((kept - kept.mean(0)).square().mean().sqrt()), rel=1e-6)
    parts = [
        InputNormalizer.estimate(x[order], segments[order]) for order in (torch.arange(4, -1, -1), torch.arange(4))
    ]
    assert [part.scale for part in parts] == pytest.approx([normalizer.scale] * 2, rel=1e-6)


def test_normalizer_refuses_constant_activations() -> None:
    with pytest.raises(UserError, match="must vary"):
        InputNormalizer.estimate(torch.ones(2, 3, 4))
    with pytest.raises(UserError, match="at least one content token"):
        InputNormalizer.estimate(torch.randn(2, 3, 4), torch.full((2, 3), -1))
