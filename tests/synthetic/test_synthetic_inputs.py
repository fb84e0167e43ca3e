"""Methods that read more than one token: their ceilings, their codes, their matching, their training batches."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tsae.config import SAEConfig
from tsae.data.harvest import ActivationBatch
from tsae.errors import UserError
from tsae.sae.model import SparseAutoencoder
from tsae.synthetic import methods as module
from tsae.synthetic.chains import Chain, Source
from tsae.synthetic.codes import code_of, directions_of
from tsae.synthetic.inputs import Crosscoder, RunningMeans
from tsae.synthetic.measure import measure
from tsae.synthetic.methods import METHODS, configuration, train
from tsae.synthetic.settings import PUBLISHED, Setting, quick
from tsae.training.trainer import Trainer

N, D, WINDOW = 6, 12, 4
# Every state lasts its whole segment, a segment its whole sequence, and every state is observed.
FOREVER = Setting(features=N, width=D, pi=0.3, rho=(1 - 1e-7,), emission=1.0, segment=1e9, d_sae=N, batch=4)


def autoencoder(encoder: Tensor, decoder: Tensor, threshold: float, **options: Any) -> SparseAutoencoder:
    """encoder: (d_in, d_sae); decoder: (d_sae, d_out)"""
    cfg = SAEConfig(d_in=len(encoder), d_sae=len(decoder), k=1, **{"activation": "batchtopk", **options})
    sae = SparseAutoencoder(cfg)
    with torch.no_grad():
        sae.W_enc.copy_(encoder)
        sae.W_dec.copy_(decoder)
        sae.b_dec.zero_()
        sae.b_enc.zero_()
        sae.threshold.fill_(threshold)
    return sae.eval()


def orthogonal(setting: Setting) -> Source:
    """The setting's stream with orthogonal directions, which an autoencoder can read without interference."""
    source = setting.source(0)
    source.directions = torch.eye(setting.features, setting.width)
    return source


def perfect(source: Source) -> Crosscoder:
    """Feature j is the mean over the window of the true feature N - 1 - j's amplitude."""
    rows = source.directions.flip(0).repeat(1, WINDOW)  # [N, WINDOW d]
    return Crosscoder(autoencoder(rows.T / WINDOW, rows, 0.1), WINDOW).eval()


def scored(setting: Setting, source: Source, sae: nn.Module, method: str = "crosscoder-4") -> dict[str, Any]:
    found = measure({"it": sae}, {"it": METHODS[method]}, setting, source, 0, lambda tokens: None)
    return {"truth": found["truth"]["rows"], **found["it"], "features": found["it"]["rows"]["features"]}


def test_a_perfect_crosscoder_of_states_that_last_scores_one() -> None:
    setting = replace(FOREVER, eval_length=32, eval_sequences=64)
    source = orthogonal(setting)
    found = scored(setting, source, perfect(source))
    row = found["features"]
    assert found["mcc"] == pytest.approx(1.0)
    assert found["explained_variance"] > 0.9  # all but what amplitudes change within a window
    assert row["all"]["corr_hidden"] > 0.98
    assert row["all"]["f1_hidden"] == pytest.approx(1.0)
    assert row["all"]["of_bayes"] == pytest.approx(row["all"]["corr_hidden"], rel=1e-5)
    assert row["on"] == pytest.approx(N * setting.pi, rel=0.3)
    assert row["l0"] == pytest.approx(row["on"] / WINDOW)  # one code a window


def test_a_crosscoder_is_compared_with_the_smoother() -> None:
    setting = replace(FOREVER, rho=(0.9,), emission=0.6, eval_length=64, eval_sequences=16)
    source = orthogonal(setting)
    sae = perfect(source)
    found = scored(setting, source, sae)
    row, truth = found["features"], found["truth"]
    assert not row["causal"]
    smoother, filtered = (truth[name]["all"]["corr_hidden"] for name in ("smoother", "filter"))
    assert smoother > filtered + 0.01
    assert row["all"]["of_bayes"] == pytest.approx(row["all"]["corr_hidden"] / smoother)
    assert row["all"]["of_bayes"] < 1
    assert row["all"]["ratio"] > 1  # it has the neighbours' observations, which one token has not
    assert scored(setting, source, perfect(source), "batchtopk")["features"]["causal"]


def test_the_bits_of_a_crosscoder_are_those_of_its_windows() -> None:
    """A state that changes with every window is as unpredictable for a crosscoder as one that changes every token."""
    setting = replace(FOREVER, rho=(0.0,), pi=0.5, eval_length=64, eval_sequences=64)
    source = orthogonal(setting)
    found = scored(setting, source, autoencoder(source.directions.T, source.directions, 0.1), "plain")
    assert found["features"]["support_bits"] == pytest.approx(N, rel=0.02)  # a bit for each feature and token
    held = Source(source.chain, D, 1e9)
    held.directions = source.directions

    def drawn(count: int, batch: int, length: int, seed: int):
        for truth in source.batches(count, batch, length // WINDOW, seed):
            yield truth._replace(
                **{
                    name: getattr(truth, name).repeat_interleave(WINDOW, 1)
                    for name in ("x", "segments", "hidden", "amplitude")
                }
            )

    held.batches = drawn  # type: ignore[method-assign]
    found = scored(setting, held, perfect(source))
    assert found["features"]["support_bits"] == pytest.approx(N / WINDOW, rel=0.03)
    assert found["features"]["l0"] == pytest.approx(found["features"]["on"] / WINDOW)
    assert found["features"]["on"] == pytest.approx(N / 2, rel=0.1)


def test_a_crosscoders_features_are_matched_by_the_mean_of_their_rows() -> None:
    directions = torch.eye(3, D)
    one, two, three = directions
    rows = torch.stack(
        [
            torch.stack([three, three, three, three]),
            torch.stack([one, one, one, -one]),  # still one
            torch.stack([0 * two, two, 0 * two, 0 * two]),  # at one position only
            torch.stack([one, two, three, -one]),  # another feature at every position
        ]
    )
    crosscoder = Crosscoder(autoencoder(torch.zeros(WINDOW * D, 4), rows.flatten(1), 0.1), WINDOW)
    found = nn.functional.normalize(directions_of(crosscoder), dim=1) @ directions.T
    torch.testing.assert_close(found[:3], torch.eye(3)[[2, 0, 1]])
    assert found[3].abs().max() < 0.75  # the best position would give 1


@pytest.mark.parametrize("name", ["crosscoder-4", "crosscoder-12", "running-means"])
def test_training_batches_keep_segments_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a trainer reads of one segment does not depend on the other segments of the row."""
    setting = replace(quick(PUBLISHED), segment=7.0, steps=1, batch=3)
    source, seen = setting.source(0), []
    monkeypatch.setattr(Trainer, "train_step", lambda self, batch, **options: seen.append(batch))

    def drawn(count: int, batch: int, length: int, seed: int):
        for truth in Source.batches(source, count, batch, length, seed):
            x = torch.where((truth.segments == 2)[..., None], shifts[-1] + truth.x, truth.x)
            yield truth._replace(x=x)

    source.batches = drawn  # type: ignore[method-assign]
    shifts = []
    for shift in (0.0, 1.0):
        shifts.append(shift)
        train({name: METHODS[name]}, setting, source, 0, lambda tokens: None)
    first, second = seen
    assert torch.equal(first.segments, second.segments)
    assert (first.segments == 2).any() or name == "crosscoder-12"  # whose windows are longer than most segments
    others = (first.segments != 2) & (first.segments >= 0)
    assert torch.equal(first.x[others], second.x[others])
    if name == "running-means":
        assert first.x.shape[-1] == 5 * setting.width
        return
    window = METHODS[name].window
    assert first.x.shape == (3, setting.length // window, window * setting.width)
    truth = next(Source.batches(source, 1, 3, setting.length, 2))  # seed + 2, of the training batches
    ids = truth.segments.unflatten(1, (-1, window))
    crossing = (ids != ids[..., :1]).any(-1)
    assert crossing.any()
    assert torch.equal(first.segments < 0, crossing)


def test_features_of_running_means_look_back_only_and_are_charged_as_they_are() -> None:
    setting = quick(PUBLISHED)
    source = setting.source(0)
    sae = train({"it": METHODS["running-means"]}, replace(setting, steps=3), source, 0, lambda tokens: None)["it"]
    assert isinstance(sae, RunningMeans)
    truth = next(source.batches(1, 2, 40, 0))
    changed = truth.x.clone()
    changed[:, 25:] += 1.0
    with torch.no_grad():
        h, other = (sae.encode(x, truth.segments) for x in (truth.x, changed))
    assert torch.equal(h[:, :25], other[:, :25])
    assert not torch.equal(h[:, 25:], other[:, 25:])
    code, segments = code_of(sae)[0](truth.x, h, truth.segments)
    assert torch.equal(code, h)
    assert torch.equal(segments, truth.segments)
    found = scored(replace(setting, eval_sequences=8), source, sae, "running-means")
    assert found["features"]["causal"]
    assert found["features"]["l0"] == found["features"]["on"]


def test_a_persistent_autoencoder_is_charged_for_what_it_integrates() -> None:
    setting = replace(FOREVER, rho=(0.5,), eval_length=64, eval_sequences=16)
    source = orthogonal(setting)
    sae = autoencoder(source.directions.T, source.directions, 0.1, activation="persistent")
    sae.decay.fill_(0.8)
    row = scored(setting, source, sae, "persistent")["features"]
    assert row["l0"] == pytest.approx(N * setting.pi, rel=0.1)  # observed at a token
    assert row["on"] > 2 * row["l0"]  # and all that was observed before


def test_equal_l0_and_groups() -> None:
    setting = quick(PUBLISHED)
    source = setting.source(0)
    drawn = next(source.batches(1, 4, setting.length, 0))
    first = ActivationBatch(drawn.x, drawn.segments)
    for name in ("crosscoder-4", "crosscoder-12"):
        method = METHODS[name]
        training = module._begin(method, configuration(method, setting, 0), first)
        assert training.trainer.cfg.sae.k == method.window * setting.k
        assert training.trainer.cfg.sae.d_sae == setting.d_sae
        assert not method.causal
    t_sae = configuration(METHODS["t-sae"], PUBLISHED, 0)
    assert t_sae.sae.groups == (16, 80)
    assert (t_sae.objective.temporal, t_sae.objective.group) == ("contrastive", 16)
    assert t_sae.objective.hold_steps == PUBLISHED.steps // 4
    assert configuration(METHODS["matryoshka"], PUBLISHED, 0).sae.groups == (8, 32, 80)
    for name, term in (("tsae", "multiscale"), ("tc-sae", "window")):
        cfg = configuration(METHODS[name], PUBLISHED, 0)
        assert (cfg.objective.temporal, cfg.objective.group) == (term, 0)


def test_sequences_hold_whole_windows() -> None:
    with pytest.raises(UserError, match=r"length is 32; it must be a multiple of the 12 tokens"):
        configuration(METHODS["crosscoder-12"], replace(PUBLISHED, length=32), 0)
    for setting in (PUBLISHED, Setting()):
        configuration(METHODS["crosscoder-12"], setting, 0)
        configuration(METHODS["crosscoder-12"], quick(setting), 0)


def test_true_chains_are_constant_here() -> None:
    """What the settings of these tests rest on."""
    source = orthogonal(FOREVER)
    truth = next(source.batches(1, 4, 64, 0))
    assert (truth.hidden == truth.hidden[:, :1]).all()
    assert torch.equal(truth.hidden, truth.amplitude > 0)
    assert isinstance(source.chain, Chain)
