"""An evaluation in the form of SAEBench's core results (`eval_output_schema_core.json` of sae-bench 0.6.0).

The fields follow SAEBench's definitions, known errors included, so that they compare with its tables (docs/metrics.md):
`explained_variance` is nearly uncentred, and `mse` is the squared error summed over dimensions and divided by the
tokens of a batch. Our `eval.json`, with the temporal metrics, is in `eval_result_unstructured`.

Differences from SAEBench: the first position (BOS) keeps its activation in every pass of the language model, also under
zero ablation (`tsae.evaluation.evaluator.evaluate` says why), and KL and cross-entropy are means over predictions
within one document.
"""

from __future__ import annotations

import dataclasses
import math
import time
import uuid
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tsae.config import TrainConfig
from tsae.evaluation.evaluator import EvaluationResult
from tsae.sae.model import SparseAutoencoder

CHUNK = 1024  # rows of the cosine matrix at a time


@torch.no_grad()
def core_output(name: str, sae: SparseAutoencoder, result: EvaluationResult, config: TrainConfig) -> dict[str, Any]:
    """The content of a results file of SAEBench's core evaluation.

    name: of the autoencoder
    config: the language model, layer, text and sizes behind `result`
    """
    metrics = result.metrics
    predicted = min(config.evaluation.ce_sequences * config.length, result.tokens)
    batch_tokens = min(config.buffer.harvest_batch * config.length, result.tokens)
    encoder, decoder = functional.normalize(sae.W_enc.T.float()), functional.normalize(sae.W_dec.float())
    max_encoder, max_decoder = _max_cosine(encoder), _max_cosine(decoder)
    per_sequence = result.tokens_per_sequence
    features = {
        "feature_density": result.density,
        "consistent_activation_heuristic": torch.zeros(sae.cfg.d_sae) if per_sequence is None else per_sequence,
        "encoder_bias": sae.b_enc,
        "encoder_norm": sae.W_enc.norm(dim=0),
        "encoder_decoder_cosine_sim": (encoder * decoder).sum(dim=1),
        "max_decoder_cosine_sim": max_decoder,
        "max_encoder_cosine_sim": max_encoder,
    }
    columns = {key: value.detach().cpu().double().tolist() for key, value in features.items()}
    return {
        "eval_type_id": "core",
        "eval_config": _eval_config(config, predicted, result.tokens),
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": {
            "model_behavior_preservation": {
                "kl_div_score": metrics["kl_div_score"],
                "kl_div_with_ablation": result.kl_divergence["with_ablation"],
                "kl_div_with_sae": result.kl_divergence["with_sae"],
            },
            "model_performance_preservation": {
                key: metrics[key]
                for key in ("ce_loss_score", "ce_loss_with_ablation", "ce_loss_with_sae", "ce_loss_without_sae")
            },
            "reconstruction_quality": {
                "explained_variance": metrics["explained_variance_saebench"],
                "explained_variance_legacy": metrics["explained_variance_legacy"],
                "mse": metrics["mse"] * sae.cfg.d_in / batch_tokens,
                "cossim": metrics["cossim"],
            },
            "shrinkage": {
                "l2_norm_in": result.norms[0],
                "l2_norm_out": result.norms[1],
                "l2_ratio": metrics["l2_ratio"],
                "relative_reconstruction_bias": metrics["relative_reconstruction_bias"],
            },
            "sparsity": {"l0": metrics["l0"], "l1": metrics["l1"]},
            "token_stats": {
                "total_tokens_eval_reconstruction": predicted,
                "total_tokens_eval_sparsity_variance": result.tokens,
            },
            "misc_metrics": {
                **_frequencies(result.density),
                "average_max_encoder_cosine_sim": float(max_encoder.mean()),
                "average_max_decoder_cosine_sim": float(max_decoder.mean()),
                "frac_alive": metrics["frac_alive"],
            },
        },
        "eval_result_details": [
            {"index": i} | {key: column[i] for key, column in columns.items()} for i in range(sae.cfg.d_sae)
        ],
        "eval_result_unstructured": {"tsae": metrics},
        **_origin(name, sae, config),
    }


def _eval_config(config: TrainConfig, predicted: int, tokens: int) -> dict[str, Any]:
    batch = config.buffer.harvest_batch
    measured = ("kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics")
    featurewise = ("density_statistics", "weight_based_metrics")
    return {
        "model_name": config.model,
        "llm_dtype": config.lm_dtype,
        "batch_size_prompts": batch,
        "n_eval_reconstruction_batches": math.ceil(predicted / config.length / batch),
        "n_eval_sparsity_variance_batches": math.ceil(tokens / config.length / batch),
        "dataset": config.data,
        "context_size": config.length,
        **{f"compute_{name}": True for name in measured},
        **{f"compute_featurewise_{name}": True for name in featurewise},
        "exclude_special_tokens_from_reconstruction": True,
        "verbose": False,
    }


def _origin(name: str, sae: SparseAutoencoder, config: TrainConfig) -> dict[str, Any]:
    measured = config.place.hook_name
    hook = {"hook_name": sae.metadata.get("hook_name", measured), "hook_layer": config.layer}
    return {
        "sae_bench_commit_hash": f"tsae {_version()}",
        "sae_lens_id": name,
        "sae_lens_release_id": None,
        "sae_lens_version": None,
        "sae_cfg_dict": dataclasses.asdict(sae.cfg) | {"model_name": config.model} | hook,
    }


def _max_cosine(unit: Tensor) -> Tensor:
    """(d_sae), the greatest cosine of each unit vector (d_sae, d_in) with another."""
    if len(unit) < 2:
        return unit.new_zeros(len(unit))
    greatest = unit.new_empty(len(unit))
    for start in range(0, len(unit), CHUNK):
        cosines = unit[start : start + CHUNK] @ unit.T
        cosines[:, start : start + CHUNK].fill_diagonal_(-1.0)
        greatest[start : start + CHUNK] = cosines.max(dim=1).values
    return greatest


def _frequencies(density: Tensor) -> dict[str, float]:
    """Fractions of features, and of all activations, from features that are active more often than 1 % and 10 %."""
    total = float(density.sum())
    out = {}
    for percent in (1, 10):
        frequent = density > percent / 100
        out[f"freq_over_{percent}_percent"] = float(frequent.double().mean())
        out[f"normalized_freq_over_{percent}_percent"] = float(density[frequent].sum()) / total if total else 0.0
    return out


def _version() -> str:
    try:
        return version("tsae")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
