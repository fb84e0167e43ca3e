"""Cross-entropy, KL divergence and scores against a float64 loop."""

import math

import pytest
import torch

from tsae.evaluation.metrics import LanguageModelMetrics
from tsae.evaluation.metrics import language_model as module


def sample(seed=0, N=3, T=6, V=11):
    """tokens, segments and the logits of four runs."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (N, 1 + T), generator=generator)
    segments = torch.zeros(N, T, dtype=torch.int32)
    segments[0, 3:] = 1
    segments[1, 2] = -1
    segments[2, -2:] = -1
    scale = {"without_sae": 1.0, "with_sae": 1.1, "with_ablation": 6.0, "with_mean_ablation": 3.0}
    untouched = torch.randn(N, 1 + T, V, generator=generator)
    logits = {
        run: untouched + (factor - 1) * torch.randn(N, 1 + T, V, generator=generator) for run, factor in scale.items()
    }
    return tokens, segments, logits


def slow_metrics(samples) -> dict[str, float]:
    loss, divergence, count = dict.fromkeys(LanguageModelMetrics.RUNS, 0.0), {}, 0
    for tokens, segments, logits in samples:
        for n in range(tokens.shape[0]):
            for i in range(segments.shape[1] - 1):
                if segments[n, i] < 0 or segments[n, i] != segments[n, i + 1]:
                    continue
                count += 1
                clean = logits["without_sae"][n, i + 1].double().log_softmax(0)
                for run, values in logits.items():
                    log_p = values[n, i + 1].double().log_softmax(0)
                    loss[run] -= float(log_p[tokens[n, i + 2]])
                    divergence[run] = divergence.get(run, 0) + float((clean.exp() * (clean - log_p)).sum())
    ce = {run: value / count for run, value in loss.items()}
    zero, mean, sae, clean = (ce[run] for run in ("with_ablation", "with_mean_ablation", "with_sae", "without_sae"))
    return {
        **{f"ce_loss_{run}": value for run, value in ce.items()},
        "ce_loss_score": (zero - sae) / (zero - clean),
        "ce_loss_score_mean_ablation": (mean - sae) / (mean - clean),
        "kl_div_score": (divergence["with_ablation"] - divergence["with_sae"]) / divergence["with_ablation"],
    }


def fed(samples) -> LanguageModelMetrics:
    metrics = LanguageModelMetrics()
    for tokens, segments, logits in samples:
        for run, values in logits.items():
            metrics.update(run, values, tokens, segments, logits["without_sae"])
    return metrics


@pytest.mark.parametrize("logits_at_once", [1, 25, 1 << 20])
def test_equals_the_definition(monkeypatch, logits_at_once):
    monkeypatch.setitem(module.CHUNK_LOGITS, "cpu", logits_at_once)
    samples = [sample(seed) for seed in range(3)]
    assert fed(samples).compute() == pytest.approx(slow_metrics(samples), rel=1e-5)


def test_merging_equals_one_pass():
    samples = [sample(seed) for seed in range(3)]
    left, right = fed(samples[:1]), fed(samples[1:])
    left.merge(right)
    assert left.compute() == pytest.approx(fed(samples).compute(), rel=1e-12)


def test_only_predictions_within_a_document_count():
    tokens, segments, logits = sample()
    expected = fed([(tokens, segments, logits)]).compute()
    spoiled = {run: values.clone() for run, values in logits.items()}
    tokens = tokens.clone()
    for values in spoiled.values():
        values[:, 0] = 50.0 * torch.randn(values.shape[-1])  # BOS
        values[:, -1] = 50.0 * torch.randn(values.shape[-1])  # nothing follows
        values[0, 3] = 50.0 * torch.randn(values.shape[-1])  # the last token of a document
        values[1, 3] = 50.0 * torch.randn(values.shape[-1])  # excluded
    tokens[:, 0] = 0
    tokens[1, 3] = 0
    assert fed([(tokens, segments, spoiled)]).compute() == expected


def test_perfect_and_useless_reconstructions():
    tokens, segments, logits = sample()
    perfect = fed([(tokens, segments, {**logits, "with_sae": logits["without_sae"]})]).compute()
    useless = fed([(tokens, segments, {**logits, "with_sae": logits["with_ablation"]})]).compute()
    assert perfect["ce_loss_score"] == perfect["ce_loss_score_mean_ablation"] == perfect["kl_div_score"] == 1
    assert useless["ce_loss_score"] == useless["kl_div_score"] == 0


def test_degenerate_sets_are_finite():
    assert set(LanguageModelMetrics().compute().values()) == {0.0}
    tokens, segments, logits = sample()
    nothing_changes = dict.fromkeys(LanguageModelMetrics.RUNS, logits["without_sae"])
    scores = fed([(tokens, segments, nothing_changes)]).compute()
    assert scores["ce_loss_score"] == scores["kl_div_score"] == 0
    excluded = fed([(tokens, torch.full_like(segments, -1), logits)]).compute()
    assert set(excluded.values()) == {0.0}


def test_half_precision_logits_are_normalised_in_float32():
    tokens, segments, logits = sample(V=4000)
    flat = {run: torch.zeros_like(values, dtype=torch.bfloat16) for run, values in logits.items()}
    loss = fed([(tokens, segments, flat)]).compute()["ce_loss_with_sae"]
    assert loss == pytest.approx(math.log(4000), rel=1e-6)


def test_unknown_run_is_named():
    tokens, segments, logits = sample()
    with pytest.raises(ValueError, match="with_sea"):
        LanguageModelMetrics().update("with_sea", logits["with_sae"], tokens, segments)
