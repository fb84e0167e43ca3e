"""Upload to and download from the Hugging Face hub: a directory of safetensors and JSON, never a pickle."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tsae.errors import UserError, reason
from tsae.formats import load as read
from tsae.hub.card import model_card, without_folders
from tsae.reports.records import read_source
from tsae.rundir import layout
from tsae.sae.model import SparseAutoencoder
from tsae.sae.saving import CONFIG
from tsae.utils.atomic import write_json
from tsae.utils.config_json import load_json
from tsae.utils.hub import hub_is_reachable
from tsae.utils.paths import expanded


def push(
    sae: SparseAutoencoder,
    repo_id: str,
    *,
    run: str | Path | None = None,
    private: bool | None = None,
    license: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    message: str = "Upload a sparse autoencoder",
) -> str:
    """Upload an autoencoder with a model card, and return the address of the commit.

    sae:       the autoencoder, on raw activations
    repo_id:   "name" or "owner/name"; created if it does not exist
    run:       its run directory, to upload the metrics, configuration and figure too
    private:   visibility of a new repository; None takes the hub's default
    license:   by the hub's name for it; None states none
    revision:  an existing branch; None is the main one
    create_pr: open a pull request instead of a commit
    token:     None takes the token of `hf auth login`
    message:   of the commit

    Raises UserError if ``run`` is not a run directory, or the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    with TemporaryDirectory() as folder:
        prepare(sae, Path(folder), repo_id, run=run, license=license)
        if not hub_is_reachable():
            raise UserError(
                f"{repo_id} cannot be uploaded because the Hugging Face hub cannot be reached; connect to the network, "
                "or write the files to a folder with `python -m tsae.hub RUN REPO --folder DIR`."
            )
        api = HfApi(token=token)
        try:
            whole = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            done = api.upload_folder(
                repo_id=whole, folder_path=folder, commit_message=message, revision=revision, create_pr=create_pr
            )
        except Exception as error:  # the client's, its HTTP library's, or about the name
            raise UserError(f"The hub did not take {repo_id}: {reason(error)}.") from error
        return str(done.pr_url or done.commit_url)


def prepare(
    sae: SparseAutoencoder,
    folder: Path,
    repo_id: str,
    *,
    run: str | Path | None = None,
    license: str | None = None,
) -> None:
    """Write the files that `push` uploads into `folder`, without the folders in paths of local models and texts.

    sae, repo_id, run, license: as for `push`
    folder: created if it does not exist

    Raises UserError if ``run`` is not a run directory.
    """
    training: dict[str, Any] = {}
    evaluation: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    text = None
    if run is not None:
        run = expanded(run)
        if not run.is_dir():
            raise UserError(f"There is no run directory {run}; name the directory that training wrote.")
        training = load_json(run / layout.CONFIG)
        for key in ("model", "data"):
            training[key] = without_folders(str(training.get(key, "")))
        evaluation = load_json(run / layout.EVALUATION) if (run / layout.EVALUATION).exists() else {}
        text = read_source(run).get("data")
        if (run / layout.AUTOENCODER / CONFIG).exists():
            metadata = load_json(run / layout.AUTOENCODER / CONFIG).get("metadata") or {}
            metadata = {k: without_folders(v) if isinstance(v, str) else v for k, v in metadata.items() if k != "tsae"}
    folder.mkdir(parents=True, exist_ok=True)
    sae.save(folder, **metadata)
    figure = None
    if run is not None:
        write_json(folder / layout.CONFIG, training)
        for name in (layout.EVALUATION, layout.REPORT, layout.SPARSITY):
            if (run / name).exists():
                shutil.copyfile(run / name, folder / Path(name).name)
        figure = layout.REPORT if (folder / layout.REPORT).exists() else None
    card = model_card(
        sae.cfg, repo_id, training=training, evaluation=evaluation, text=text, figure=figure, license=license
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def load(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    device: str | torch.device = "cpu",
) -> SparseAutoencoder:
    """`tsae.load` without pickles: an autoencoder from the hub or a local directory.

    name:             `OWNER/NAME[/FOLDER...][@REVISION]` on the hub, or the directory of an autoencoder or a run
    revision:         branch, tag or commit
    token:            for a private repository; None takes the token of `hf auth login`
    cache_dir:        None is the hub client's cache
    local_files_only: do not use the network
    device:           of its parameters

    Raises UserError if there is no such autoencoder, it is damaged, or it exists only as pickles.
    """
    return read(
        name,
        device,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        pickles=False,
    )
