"""Upload to and download from a fake hub through the real client."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from stand_in import StandIn

import tsae.hub
from tsae import SAEConfig, SparseAutoencoder, UserError
from tsae.config import TrainConfig
from tsae.hub.__main__ import main
from tsae.hub.card import model_card, plain
from tsae.utils.config_json import to_dict

EVALUATION = {
    "explained_variance": 0.9123,
    "l0": 6.1,
    "ce_loss_score": 0.98,
    "temporal": {"persistence_excess": 0.31, "autocorrelation": {"1": 0.4}},
}


@pytest.fixture
def sae() -> SparseAutoencoder:
    cfg = SAEConfig(d_in=16, d_sae=40, activation="schmitt", k=6)
    sae = SparseAutoencoder(cfg, generator=torch.Generator().manual_seed(3)).eval()
    sae.threshold.fill_(0.9)
    sae.release.fill_(0.2)
    return sae


@pytest.fixture
def run(sae: SparseAutoencoder, tmp_path: Path) -> Path:
    """A run directory as training leaves it, of a local model and text."""
    out = tmp_path / "my run"
    private = tmp_path / "home" / "secret"
    cfg = TrainConfig(model=str(private / "my-model"), data=str(private / "my|texts.jsonl"), layer=3, sae=sae.cfg)
    sae.save(out / "sae", model_name=cfg.model, dataset_path=cfg.data, hook_name="blocks.3.hook_resid_post")
    (out / "config.json").write_text(json.dumps(to_dict(cfg)))
    (out / "eval.json").write_text(json.dumps(EVALUATION))
    (out / "report.png").write_bytes(b"\x89PNG made up")
    (out / "sae" / "sparsity.safetensors").write_bytes(b"made up")
    (out / "metrics.jsonl").write_text("{}\n")
    return out


def equal(a: SparseAutoencoder, b: SparseAutoencoder) -> None:
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    assert (a.encode(x) > 0).any()
    assert torch.equal(a.encode(x), b.encode(x))
    assert torch.equal(a(x), b(x))


def test_there_and_back(hub: StandIn, sae: SparseAutoencoder, run: Path, tmp_path: Path) -> None:
    where = tsae.hub.push(sae, "me/river-sae", run=run, token=hub.token)
    assert where.startswith(f"{hub.url}/me/river-sae/commit/")
    files = hub.repositories["me/river-sae"]
    assert set(files) == {
        *("README.md", "cfg.json", "config.json", "eval.json", "report.png", "sae_weights.safetensors"),
        "sparsity.safetensors",
    }
    assert json.loads(files["eval.json"]) == EVALUATION
    back = tsae.hub.load("me/river-sae")
    assert not back.training
    equal(sae, back)
    assert hub.fetched() == {"cfg.json", "config.json", "sae_weights.safetensors"}
    # Again, over the existing repository; and from the cache once the hub is down.
    assert tsae.hub.push(sae, "me/river-sae", token=hub.token)
    hub.close()
    equal(sae, tsae.hub.load("me/river-sae", local_files_only=True))


def test_no_folder_of_the_author_leaves_the_machine(hub: StandIn, sae: SparseAutoencoder, run: Path) -> None:
    tsae.hub.push(sae, "me/river-sae", run=run, token=hub.token)
    for name, content in hub.repositories["me/river-sae"].items():
        assert b"secret" not in content, name
    metadata = json.loads(hub.repositories["me/river-sae"]["cfg.json"])["metadata"]
    assert metadata["model_name"] == "my-model"
    assert metadata["hook_name"] == "blocks.3.hook_resid_post"


def test_the_card_says_what_it_is(hub: StandIn, sae: SparseAutoencoder, run: Path) -> None:
    tsae.hub.push(sae, "me/river-sae", run=run, token=hub.token, license="apache-2.0")
    card = ModelCard(hub.repositories["me/river-sae"]["README.md"].decode())
    assert card.data.library_name == "tsae"
    assert "sparse-autoencoder" in card.data.tags
    assert card.data.license == "apache-2.0"
    assert card.data.base_model is None  # a local model is not on the hub
    assert "| explained variance | 0.9123 |" in card.text
    assert "| P(stays on), beyond chance | 0.3100 |" in card.text
    assert "smoothness" not in card.text  # which was not measured
    assert "![The run's report](report.png)" in card.text
    assert r"my\|texts.jsonl" in card.text
    assert 'tsae.load("me/river-sae")' in card.text
    assert "hysteresis" in card.text


def test_the_card_names_the_hubs_model_and_text_and_states_no_license_of_its_own() -> None:
    training = {
        "model": "google/gemma-2-2b",
        "data": "monology/pile-uncopyrighted",
        "layer": 12,
        "steps": 10,
        "batch": 2,
    }
    card = ModelCard(model_card(SAEConfig(d_in=4, d_sae=8, activation="relu"), "me/x", training=training))
    assert card.data.base_model == "google/gemma-2-2b"
    assert card.data.datasets == "monology/pile-uncopyrighted"
    assert card.data.license is None
    assert "10 of 2 x 128 tokens" in card.text
    assert "hysteresis" not in card.text
    assert "Measured" not in card.text
    assert plain("<b>a|b\nc</b>") == r"\<b\>a\|b c\</b\>"


def test_the_code_of_the_card_runs(hub: StandIn, sae: SparseAutoencoder) -> None:
    tsae.hub.push(sae, "me/x", token=hub.token)
    card = hub.repositories["me/x"]["README.md"].decode()
    code = card.split("```python\n")[1].split("```")[0]
    scope = {"x": torch.randn(2, 5, 16)}
    exec(code, scope)
    assert scope["h"].shape == (2, 5, 40)
    assert scope["xhat"].shape == (2, 5, 16)


def test_a_repository_of_pickles_is_refused_and_none_is_read(hub: StandIn, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "trapped",))

    pickled = {"ae.pt": pickle.dumps(Trap()), "trainer_0/ae.pt": pickle.dumps(Trap()), "cfg.json": b"{}"}
    hub.repositories["them/pickled"] = pickled
    for name, content in pickled.items():
        (tmp_path / "local" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "local" / name).write_bytes(content)
    for place in ("them/pickled", "them/pickled/trainer_0", tmp_path / "local", tmp_path / "local" / "ae.pt"):
        with pytest.raises(UserError, match=r"looked for .*sae_weights\.safetensors.*Only tsae\.load reads pickles"):
            tsae.hub.load(place)
    assert hub.fetched() == {"cfg.json"}
    assert not (tmp_path / "trapped").exists()


def test_local_directories_of_runs_and_autoencoders(sae: SparseAutoencoder, run: Path, tmp_path: Path) -> None:
    equal(sae, tsae.hub.load(run))
    equal(sae, tsae.hub.load(str(run / "sae")))
    for missing in (tmp_path / "none", "./none", "none"):
        with pytest.raises(UserError, match="There is no "):
            tsae.hub.load(missing)


READERS = [tsae.hub.load, tsae.load]


@pytest.mark.parametrize("read", READERS)
def test_every_reader_takes_what_the_hub_offers(
    read: Callable[..., SparseAutoencoder], hub: StandIn, sae: SparseAutoencoder, tmp_path: Path
) -> None:
    """A folder, a revision, a private repository, another cache, a device; and the same errors."""
    sae.save(tmp_path / "saved")
    files = {f"layer_3/{path.name}": path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    hub.repositories["me/saes"] = files | {"layer_4/cfg.json": b"{}", "README.md": b"# many"}
    hub.private.add("me/saes")
    place = "me/saes/layer_3"
    with pytest.raises(UserError, match=r"^me/saes/layer_3 cannot be read from the hub: .*[^.]\.$") as refused:
        read(place)
    assert "\n" not in str(refused.value)
    cache = tmp_path / "own"
    equal(sae, read(place, revision="v1.0", token=hub.token, cache_dir=cache))
    equal(sae, read(f"{place}@v2.0", token=hub.token, cache_dir=cache))
    assert [any(f"/revision/{name}" in request for request in hub.requests) for name in ("v1.0", "v2.0")] == [True] * 2
    assert hub.fetched() == set(files)
    assert list(cache.glob("models--me--saes/snapshots/*/layer_3/cfg.json"))
    with pytest.raises(UserError, match=r"v2\.0 and revision='v1\.0' name different revisions; name one"):
        read(f"{place}@v2.0", revision="v1.0")
    asked = len(hub.requests)
    equal(sae, read(f"{place}@v2.0", cache_dir=cache, local_files_only=True))
    with pytest.raises(UserError, match=r"neither a local directory nor in the cache, .* may not be used"):
        read("me/other", local_files_only=True)
    assert len(hub.requests) == asked
    hub.close()
    equal(sae, read(f"{place}@v2.0", cache_dir=cache, device="cpu"))
    with pytest.raises(UserError, match=r"neither a local directory nor in the cache, .* cannot be reached"):
        read("me/other")


def test_what_the_hub_refuses_is_one_sentence(hub: StandIn, sae: SparseAutoencoder) -> None:
    with pytest.raises(UserError, match="me/none cannot be read from the hub: "):
        tsae.hub.load("me/none")
    with pytest.raises(UserError, match="The hub did not take me/x: ") as refused:
        tsae.hub.push(sae, "me/x", token="hf_wrong")
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="The hub did not take me//x: "):
        tsae.hub.push(sae, "me//x", token=hub.token)
    assert hub.repositories == {}


def test_without_a_network(hub: StandIn, sae: SparseAutoencoder) -> None:
    hub.close()
    with pytest.raises(UserError, match="cannot be uploaded because the Hugging Face hub cannot be reached"):
        tsae.hub.push(sae, "me/x", token=hub.token)
    with pytest.raises(UserError, match="neither a local directory nor in the cache"):
        tsae.hub.load("me/x")


def test_the_command_writes_a_folder_or_uploads(
    hub: StandIn,
    sae: SparseAutoencoder,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "folder"
    assert main([str(run), "me/x", "--folder", str(folder)]) == 0
    assert hub.requests == []
    assert (folder / "README.md").is_file()
    equal(sae, tsae.hub.load(folder))
    assert main([str(run), "me/x", "--folder", str(folder)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert main([str(run), "me/x", "--private"]) == 0
    assert hub.private == {"me/x"}
    assert f"Uploaded: {hub.url}/me/x/commit/" in capsys.readouterr().err.replace("\n", "")
    assert main([str(tmp_path / "none"), "me/x"]) == 2
