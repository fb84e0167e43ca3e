"""Against the real SAEBench: its interface for custom SAEs, its metrics on ours, and its schema."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluated_run import write_run
from peer_cases import D_IN, D_SAE, activations, same_to, trained

import tsae
from tsae.evaluate import main

reason = "sae-bench is not installed; make peers"
base_sae = pytest.importorskip("sae_bench.custom_saes.base_sae", reason=reason)
core = pytest.importorskip("sae_bench.evals.core.main", reason=reason)
integration = pytest.importorskip("tsae.integrations.sae_bench")


def bos_apart(x: torch.Tensor) -> torch.Tensor:
    segments = torch.ones(x.shape[:2], dtype=torch.int32)
    segments[:, 0] = 0
    return segments


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu", "schmitt", "gelu"])
def test_the_wrapper_is_a_custom_sae(activation: str) -> None:
    ours, x = trained(activation), activations()
    sae = integration.SAEBenchSAE(ours, "pythia-70m-deduped", 4)
    assert isinstance(sae, base_sae.BaseSAE)
    assert sae.check_decoder_norms()
    assert (sae.W_enc.shape, sae.W_dec.shape) == ((D_IN, D_SAE), (D_SAE, D_IN))
    assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.hook_name) == (D_IN, D_SAE, "blocks.4.hook_resid_post")
    assert (sae.cfg.hook_layer, sae.cfg.model_name, sae.cfg.dtype) == (4, "pythia-70m-deduped", "float32")
    json.dumps(sae.cfg.to_dict())
    sae.train()
    with torch.no_grad():
        h = ours.encode(x, bos_apart(x))
        same_to(sae.encode(x), h)
        same_to(sae(x), ours.decode(h))
        torch.testing.assert_close(sae.encode(x[0]), h[0])  # one sequence
    half = sae.to(dtype=torch.bfloat16)
    assert {half.dtype, half.W_enc.dtype, half.inner.W_enc.dtype} == {torch.bfloat16}
    assert half.inner.W_enc is half.W_enc
    assert half.encode(x.bfloat16()).dtype == torch.bfloat16


def test_decoder_norms_move_into_the_encoder() -> None:
    x = activations()
    for activation in ("relu", "jumprelu", "schmitt"):
        ours = trained(activation)
        with torch.no_grad():
            ours.W_dec.mul_(torch.linspace(0.5, 2, D_SAE)[:, None])
            sae = integration.SAEBenchSAE(ours, "m", 0)
            assert sae.check_decoder_norms()
            h = ours.encode(x, bos_apart(x))
            same_to(sae.encode(x), h * torch.linspace(0.5, 2, D_SAE))
            same_to(sae(x), ours.decode(h))
    ours = trained("topk")
    with torch.no_grad():
        ours.W_dec.mul_(2.0)
    with pytest.raises(tsae.UserError, match=r"decoder rows of norm 1, but these have norms from 2 to 2"):
        integration.SAEBenchSAE(ours, "m", 0)


class Model:
    """The part of a HookedTransformer that SAEBench uses: activations per token."""

    def __init__(self) -> None:
        self.embedding = torch.randn(50, D_IN, generator=torch.Generator().manual_seed(5)) * 25 + 600

    def run_with_cache(self, tokens: torch.Tensor, **_: Any) -> tuple[None, dict[str, torch.Tensor]]:
        return None, {"blocks.4.hook_resid_post": self.embedding[tokens]}


class Store:
    def get_batch_tokens(self, size: int) -> torch.Tensor:
        return torch.randint(0, 50, (size, 32), generator=torch.Generator().manual_seed(6))


def test_saebench_s_own_metrics_run_on_it() -> None:
    """They agree with ours where the definitions agree."""
    from sae_bench.sae_bench_utils import general_utils

    from tsae.evaluation.metrics import ReconstructionMetrics

    ours = trained("schmitt")
    sae = integration.SAEBenchSAE(ours, "pythia-70m-deduped", 4)
    sae_id, sae, _ = general_utils.load_and_format_sae("mine", sae, "cpu")
    assert sae_id == "custom_sae"
    with torch.no_grad():
        metrics, features = core.get_sparsity_and_variance_metrics(
            sae, Model(), Store(), 1, True, True, True, True, 4, {}
        )
        weights = core.get_featurewise_weight_based_metrics(sae)
        x = Model().embedding[Store().get_batch_tokens(4)]
        h = ours.encode(x, bos_apart(x))
        reconstruction = ReconstructionMetrics()
        reconstruction.update(x, ours.decode(h), h, bos_apart(x))
    expected = reconstruction.compute()
    for name in ("l0", "l1", "l2_ratio", "cossim", "relative_reconstruction_bias", "explained_variance_legacy"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4), name
    assert (metrics["l2_norm_in"], metrics["l2_norm_out"]) == pytest.approx(reconstruction.norms(), rel=1e-5)
    density = torch.tensor(features["feature_density"]).double()
    torch.testing.assert_close(density, reconstruction.density(), rtol=1e-4, atol=1e-7)
    heuristic = torch.tensor(features["consistent_activation_heuristic"]).double().nan_to_num()
    torch.testing.assert_close(heuristic, reconstruction.tokens_per_sequence(), rtol=1e-4, atol=1e-7)
    assert len(weights["encoder_norm"]) == D_SAE


@pytest.fixture
def core_file(tiny_gemma3: Path, tmp_path: Path) -> Path:
    run = write_run(tmp_path / "run", tiny_gemma3, activation="schmitt")
    assert main([str(run), "--format", "saebench"]) == 0
    return run / "saebench_core.json"


def test_the_file_is_valid_by_the_installed_schema(core_file: Path) -> None:
    import sae_bench.evals.core.eval_output as output

    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed; make peers")
    schema = json.loads(Path(output.__file__).with_name("eval_output_schema_core.json").read_text())
    values = json.loads(core_file.read_text())
    jsonschema.validate(values, schema)
    known = schema["properties"]
    assert set(values) == set(known)  # no field outside the schema
    for name, part in (("eval_config", "CoreEvalConfig"), ("eval_result_metrics", "CoreMetricCategories")):
        assert set(values[name]) == set(schema["$defs"][part]["properties"])
    for name, metrics in values["eval_result_metrics"].items():
        (part,) = re.findall(r"\w+$", schema["$defs"]["CoreMetricCategories"]["properties"][name]["$ref"])
        assert set(metrics) == set(schema["$defs"][part]["properties"]), name
    parsed = output.CoreEvalOutput(**values)
    assert parsed.eval_result_metrics.sparsity.l0 == values["eval_result_metrics"]["sparsity"]["l0"]
    assert len(parsed.eval_result_details) == values["sae_cfg_dict"]["d_sae"]


def test_its_weight_based_metrics_are_saebench_s(core_file: Path) -> None:
    values = json.loads(core_file.read_text())
    sae = tsae.load(core_file.parent)
    wrapper = integration.SAEBenchSAE(sae, "m", 1)
    wrapper.cfg.architecture_str = wrapper.cfg.architecture
    with torch.no_grad():
        theirs = core.get_featurewise_weight_based_metrics(wrapper)
    theirs["feature_density"] = [feature["feature_density"] for feature in values["eval_result_details"]]
    for name in set(theirs) - {"feature_density"}:
        ours = [feature[name] for feature in values["eval_result_details"]]
        assert ours == pytest.approx(theirs[name], abs=1e-5), name
    misc = core.calculate_misc_metrics(theirs)
    assert values["eval_result_metrics"]["misc_metrics"] == pytest.approx(misc, rel=1e-4, abs=1e-6)
