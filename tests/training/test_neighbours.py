"""The neighbours under experiments/: what they read, what they are charged, the Markov chains, slow directions."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_sae import D_IN, D_SAE, make
from torch import Tensor

from experiments import hmm, inputs, neighbours, persistent_code, slow_variance
from experiments.summary import read_sweeps
from tsae.config import SAEConfig, TrainConfig
from tsae.data.harvest import ActivationBatch
from tsae.errors import UserError
from tsae.evaluation.metrics import CodeLength
from tsae.sae.model import SparseAutoencoder
from tsae.synthetic.inputs import Crosscoder, RunningMeans, encoder_mask, running_means, windows
from tsae.synthetic.training import CrosscoderTraining, RunningMeansTraining
from tsae.train import main as train
from tsae.training.sweep_file import with_options
from tsae_kernels import leaky_recurrence

SEGMENTS = torch.tensor([[0] * 16, [0] * 5 + [1] * 11, [3, 3, -1, 3, 4, 4, 4, 4, -1, -1, 5, 5, 5, 5, 5, 5]])


def activations(seed: int = 0, b: int = 3, t: int = 16, d: int = D_IN) -> Tensor:
    return torch.randn(b, t, d, generator=torch.Generator().manual_seed(seed)) + 3.0


def test_running_means_are_weighted_means_of_the_segments_past() -> None:
    x = activations()
    found = running_means(x, SEGMENTS, (1.0, 7.0))
    for b, t in ((0, 0), (0, 15), (1, 4), (1, 5), (1, 9), (2, 3), (2, 15)):
        start = t
        while start > 0 and SEGMENTS[b, start - 1] == SEGMENTS[b, t]:
            start -= 1
        for i, constant in enumerate((1.0, 7.0)):
            weights = torch.exp(-torch.arange(t - start, -1, -1) / constant)
            mean = (weights[:, None] * x[b, start : t + 1]).sum(0) / weights.sum()
            torch.testing.assert_close(found[b, t, i * D_IN : (i + 1) * D_IN], mean)


def test_every_feature_of_running_means_reads_one_input() -> None:
    mask = encoder_mask(4, 20, 3, 2)
    assert mask.shape == (12, 20)
    assert (mask.sum(0) == 4).all()
    blocks = mask.view(3, 4, 20)[:, 0].argmax(0)
    assert blocks.tolist() == [0] * 14 + [1] * 3 + [2] * 3


def base(**options: Any) -> TrainConfig:
    cfg = with_options(TrainConfig(), {"steps": 40, "batch": 3, "objective.temporal": "none", "objective.l1": 0.0})
    cfg = with_options(cfg, {"objective.boost": 1.0, "optimizer.lr": 0.01, **options})
    return replace(cfg, sae=SAEConfig(d_in=D_IN, d_sae=D_SAE, k=6, activation="batchtopk"))


@pytest.mark.parametrize(("kind", "size"), [(CrosscoderTraining, 12), (RunningMeansTraining, 4)])
def test_they_learn_and_survive_the_disk(kind: Any, size: int, tmp_path: Path) -> None:
    batch = ActivationBatch(activations(1), SEGMENTS)
    method = kind(size, base(), batch, torch.device("cpu"), autocast=False)
    losses = [method.trainer.train_step(method.batch(batch), log=True)["reconstruction"] for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
    module = method.finished()
    x = activations(1)
    counted = SEGMENTS >= 0
    with torch.no_grad():
        xhat = module(x, SEGMENTS)
    assert xhat.shape == x.shape
    residual, centred = (x - xhat)[counted], (x - x[counted].mean(0))[counted]
    assert float(residual.square().sum() / centred.square().sum()) < 0.6
    if isinstance(module, RunningMeans):
        mask = encoder_mask(D_IN, D_SAE, size, 3)
        assert not module.inner.W_enc[mask == 0].any()
        assert module.inner.W_enc[mask == 1].all()
    inputs.save(module, tmp_path)
    assert torch.equal(inputs.load(tmp_path)(x, SEGMENTS), xhat)


def test_windows_do_not_cross_segments() -> None:
    x = activations()
    stacked, ids = windows(x, SEGMENTS, 4)
    assert stacked.shape == (3, 4, 4 * D_IN)
    assert ids.tolist() == [[0, 0, 0, 0], [0, -1, 1, 1], [-1, 4, -1, 5]]
    torch.testing.assert_close(stacked[1, 2], x[1, 8:12].flatten())


def crosscoder() -> Crosscoder:
    inner = SparseAutoencoder(SAEConfig(d_in=4 * D_IN, d_sae=D_SAE, activation="batchtopk"))
    with torch.no_grad():
        inner.b_dec.copy_(torch.randn(4 * D_IN, generator=torch.Generator().manual_seed(1)))
        inner.threshold.fill_(0.5)
    return Crosscoder(inner.eval(), 4).eval()


def test_a_crosscoder_reads_and_writes_each_window_within_a_segment() -> None:
    module, x = crosscoder(), activations()
    h, xhat = module.encode(x, SEGMENTS), module(x, SEGMENTS)
    inner = module.inner
    whole = inner.encode(x[1, 8:12].flatten()[None])[0]
    for t in range(4):
        torch.testing.assert_close(h[1, 8 + t], whole)
        block = slice(t * D_IN, (t + 1) * D_IN)
        torch.testing.assert_close(xhat[1, 8 + t], whole @ inner.W_dec[:, block] + inner.b_dec[block])
    changed = x.clone()
    changed[1, 5:] += 1.0  # token 4 is alone in its window, with the tokens of another segment
    assert torch.equal(module.encode(changed, SEGMENTS)[1, :5], h[1, :5])
    assert not torch.equal(h[1, 4], h[1, 5])
    torch.testing.assert_close(module.encode(x[:, :14], SEGMENTS[:, :14])[0, :12], h[0, :12])  # any length
    codes, ids, places = module.window_codes(h, SEGMENTS)
    assert [row[row >= 0].tolist() for row in ids] == [[0] * 4, [0, 0, 1, 1, 1], [3, 3, 4, 5, 5]]
    assert places[1, :5].tolist() == [0, 4, 5, 8, 12]
    assert torch.equal(codes[1, 3], h[1, 8])


class Model:
    """Activations in the place of a language model's."""


def test_a_crosscoder_is_charged_once_for_each_window(monkeypatch: pytest.MonkeyPatch) -> None:
    x, segments = activations(2, b=4), torch.zeros(4, 16, dtype=torch.int32)
    monkeypatch.setattr(neighbours, "content_activations", lambda lm, batch, place: x)
    module, cfg = crosscoder(), TrainConfig()
    batch = type("Batch", (), {"segments": segments})()
    norms = module.inner.W_dec.double().norm(dim=1)
    found = neighbours.code_bits(neighbours.window_codes(module), norms, 0.3, [batch], cfg, Model())  # type: ignore[arg-type, list-item]
    codes = module.inner.encode(x.reshape(4, 4, -1))
    expected = CodeLength()
    expected.update(codes, segments[:, :4], torch.tensor([0, 0, 1, 1])[:, None].expand(4, 4))
    wanted = expected.compute(0.3, norms)
    assert found.pop("l0") == pytest.approx(float((codes > 0).sum()) / 64)
    assert found == pytest.approx({name: value / 4 for name, value in wanted.items()})


def test_what_a_recurrence_integrates_is_its_code() -> None:
    sae, plain = make(activation="persistent"), make(activation="batchtopk")
    sae.decay.fill_(0.8)
    code, x = persistent_code.SparseInput(sae), activations()
    h, ids, _ = code.codes(x, SEGMENTS)
    counted = SEGMENTS >= 0
    torch.testing.assert_close(h[counted], plain.encode(x, SEGMENTS)[counted])
    assert torch.equal(ids, SEGMENTS)
    assert float(sae.decay[0]) == pytest.approx(0.8)
    error = torch.zeros(1, 200, D_SAE)
    error[0, 0, 3] = 1.0
    made = leaky_recurrence(error, sae.decay) @ sae.W_dec
    assert float(made.detach().square().sum().sqrt()) == pytest.approx(float(code.norms[3]), rel=1e-4)
    with pytest.raises(UserError, match="name a run of persistent"):
        persistent_code.SparseInput(plain)


def test_json_is_read_by_the_summary(tmp_path: Path) -> None:
    neighbours.to_json({"a": {"l0": 36.123456789, "temporal": {"lag": {"1": 0.5}}}}, tmp_path / "found.json")
    assert read_sweeps([tmp_path / "found.json"]) == {
        "neighbours-inputs": {"a": {"l0": 36.1235, "temporal": {"lag": {"1": 0.5}}}}
    }


def chain(generator: torch.Generator, features: int = 2) -> hmm.Chain:
    numbers = torch.rand(7, features, generator=generator, dtype=torch.float64)
    mean, std = (numbers[0] - 1, numbers[1] + 0.5), (0.5 + numbers[2], 0.5 + numbers[3])
    return hmm.Chain(mean, std, *(0.05 + 0.9 * numbers[4:]))


@pytest.mark.parametrize("causal", [False, True])
def test_posteriors_are_those_of_all_paths(causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    model, tokens = chain(generator), 6
    z = torch.randn(1, tokens, 2, generator=generator, dtype=torch.float64)
    found = hmm.log_odds(z, model, causal=causal)
    for j, last in itertools.product(range(2), range(1, tokens + 1)):
        known, where = (z[0, :last, j], last - 1) if causal else (z[0, :, j], last - 1)
        mass = [0.0, 0.0]
        for path in itertools.product((0, 1), repeat=len(known)):
            p = 1.0
            for t, state in enumerate(path):
                before = model.density[j] if t == 0 else (model.on_after_off[j], model.on_after_on[j])[path[t - 1]]
                p *= float(before if state else 1 - before)
                emission = torch.distributions.Normal(model.mean[state][j], model.std[state][j])
                p *= float(emission.log_prob(known[t]).exp())
            mass[path[where]] += p
        assert float(found[0, last - 1, j]) == pytest.approx(math.log(mass[1] / mass[0]), abs=1e-9)


def test_segments_are_chains_of_their_own() -> None:
    generator = torch.Generator().manual_seed(1)
    model = chain(generator)
    z = torch.randn(1, 9, 2, generator=generator, dtype=torch.float64)
    ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    together = hmm.log_odds(z, model, ids)
    torch.testing.assert_close(together[:, :4], hmm.log_odds(z[:, :4], model))
    torch.testing.assert_close(together[:, 4:], hmm.log_odds(z[:, 4:], model))


def test_a_chain_is_fitted_to_what_the_threshold_says() -> None:
    """One feature that reads one input: a two-state chain whose emissions do not overlap at the threshold."""
    generator = torch.Generator().manual_seed(2)
    state, states = 0, []
    for _ in range(20_000):
        state = int(torch.rand((), generator=generator) < (0.05, 0.9)[state])
        states.append(state)
    on = torch.tensor(states, dtype=torch.float32).view(10, 2000)
    z = torch.where(on > 0, 3.0, -1.0) + 0.4 * torch.randn(10, 2000, generator=generator)
    sae = SparseAutoencoder(SAEConfig(d_in=1, d_sae=1, k=1, activation="batchtopk")).eval()
    with torch.no_grad():
        sae.W_enc.fill_(1.0)
        sae.threshold.fill_(1.0)
    found = hmm.fit(sae, [ActivationBatch(z[..., None], torch.zeros(10, 2000, dtype=torch.int32))])
    for values, wanted in ((found.mean, (-1.0, 3.0)), (found.std, (0.4, 0.4))):
        assert [float(value) for value in values] == pytest.approx(wanted, abs=0.03)
    assert float(found.on_after_off) == pytest.approx(0.05, abs=0.005)
    assert float(found.on_after_on) == pytest.approx(0.9, abs=0.01)
    assert float(found.density) == pytest.approx(1 / 3, abs=0.03)
    noisy = torch.where(on > 0, 1.2, 0.6)[..., None]  # between the two: the neighbours decide
    kept = hmm.HiddenMarkov(sae, found).encode(noisy) > 0
    assert float(((kept[..., 0] != (on > 0)) & (on > 0)).float().mean()) < 0.35


def test_hysteresis_is_no_plain_threshold() -> None:
    with pytest.raises(UserError, match="has hysteresis or no threshold"):
        hmm.fit(make(activation="schmitt"), [])
    with pytest.raises(UserError, match="has hysteresis or no threshold"):
        hmm.fit(make(activation="persistent"), [])
    plain = make(activation="schmitt")
    plain.release.copy_(plain.threshold)
    x = ActivationBatch(activations(), SEGMENTS)
    assert hmm.fit(plain, [x]).density.isfinite().all()


def slow_text(seed: int) -> list[ActivationBatch]:
    """Two slow directions (coefficient 0.95) of 8, of standard deviation 2, among white noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(30, 200, 10, generator=generator)
    slow = torch.zeros(30, 200, 2)
    slow[:, 0] = noise[:, 0, 8:]
    for t in range(1, 200):
        slow[:, t] = 0.95 * slow[:, t - 1] + (1 - 0.95**2) ** 0.5 * noise[:, t, 8:]
    x = torch.cat([2 * slow, noise[..., :6]], dim=-1) @ mixing() + 5.0
    ids = torch.zeros(30, 200, dtype=torch.int32)
    ids[:, 150:] = 1
    return [ActivationBatch(x, ids)]


def mixing() -> Tensor:
    return torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(9)))[0]


class Reconstruction(torch.nn.Module):
    """What is kept of the slow directions and of the others."""

    def __init__(self, slow: float, other: float) -> None:
        super().__init__()
        self.keep = torch.tensor([slow] * 2 + [other] * 6)

    def forward(self, x: Tensor, segments: Tensor) -> Tensor:
        return ((x - 5.0) @ mixing().T * self.keep) @ mixing() + 5.0


def test_slow_variance_is_found_and_what_explains_it() -> None:
    modules = {"slow alone": Reconstruction(1.0, 0.0), "fast alone": Reconstruction(0.0, 1.0)}
    modules["half"] = Reconstruction(0.5, 0.5)
    found = slow_variance.measure(modules, slow_text(0), slow_text(1), lag=8, above=0.3)  # type: ignore[arg-type]
    assert found["directions"] == 2
    assert found["massive_tokens"] == 0
    assert found["autocorrelation"] == pytest.approx([0.95**8] * 2, abs=0.12)
    assert found["variance_share"] == pytest.approx(8 / 14, abs=0.05)
    runs = found["runs"]
    assert runs["slow alone"]["slow_explained_variance"] == pytest.approx(1.0, abs=0.02)
    assert runs["fast alone"]["slow_explained_variance"] == pytest.approx(0.0, abs=0.05)
    assert runs["half"]["slow_explained_variance"] == pytest.approx(0.75, abs=0.01)
    assert runs["half"]["explained_variance"] == pytest.approx(0.75, abs=0.01)
    with pytest.raises(UserError, match=r"No direction has a held-out autocorrelation above 0\.99"):
        slow_variance.measure({}, slow_text(0), slow_text(1), lag=8, above=0.99)


SWEEP = """
base:
  {{model: {model}, data: {data}, layer: 1, steps: 6, batch: 4, device: cpu, log_every: 3, sae.d_sae: 48, sae.k: 6,
   sae.release_ratio: 1.0, objective.temporal: none, buffer.sequences: 24, buffer.harvest_batch: 8, buffer.reuse: 1,
   buffer.estimate_sequences: 16, evaluation.sequences: 8, evaluation.ce_sequences: 2, text.evaluation_share: 0.2}}
runs:
  plain: {{}}
  persistent: {{sae.activation: persistent}}
"""


def test_the_commands_together(
    tiny_gemma2: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, runs, more = tmp_path / "sweep.yaml", tmp_path / "runs", tmp_path / "inputs"
    file.write_text(SWEEP.format(model=tiny_gemma2, data=text_file))
    methods = {"crosscoder-8": (CrosscoderTraining, 8), "running-means-4": (RunningMeansTraining, 4)}
    monkeypatch.setattr(neighbours, "SWEEP", file)
    monkeypatch.setattr(neighbours, "METHODS", methods)

    def called(module: Any, *arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["script", *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    assert train(["--sweep", str(file), "--out", str(runs)]) == 0
    output = called(neighbours, more, "--json", tmp_path / "inputs.json")
    assert "crosscoder-8, step 6: explained variance" in output
    again = called(neighbours, more, "--json", tmp_path / "inputs.json")
    assert "step 6" not in again
    called(hmm, runs / "plain", "--json", tmp_path / "hmm.json")
    called(hmm, runs / "plain", "--causal", "--json", tmp_path / "filter.json")
    called(persistent_code, runs / "persistent", "--json", tmp_path / "code.json")
    names = ("inputs", "hmm", "filter", "code")
    found = read_sweeps([runs, *(tmp_path / f"{name}.json" for name in names)])
    assert {name for each in found.values() for name in each} == {
        *("plain", "persistent", *methods, "plain@hmm", "plain@filter", "persistent@code")
    }
    integrated, code = found["runs"]["persistent"], found["neighbours-persistent"]["persistent@code"]
    assert code["l0"] < integrated["l0"]
    assert code["explained_variance"] == pytest.approx(integrated["explained_variance"], rel=1e-5)
    assert found["neighbours-inputs"]["crosscoder-8"]["l0"] < 8
    both = [runs / "plain", runs / "persistent", more / "crosscoder-8", more / "running-means-4", runs / "checkpoint"]
    sizes = ("--training", 16, "--held-out", 8, "--lag", 4, "--above", -2)
    called(slow_variance, tmp_path / "slow.json", *both, *sizes)
    slow = json.loads((tmp_path / "slow.json").read_text())
    assert slow["directions"] == 32  # all of them
    assert slow["variance_share"] == pytest.approx(1.0, abs=1e-3)
    assert list(slow["runs"]) == ["plain", "persistent", *methods]
    for name, values in slow["runs"].items():
        assert values["slow_explained_variance"] == pytest.approx(values["explained_variance"], abs=1e-3), name
        known = found["runs" if name in found["runs"] else "neighbours-inputs"][name]["explained_variance"]
        assert values["explained_variance"] == pytest.approx(known, abs=0.02), name
