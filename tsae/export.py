"""An autoencoder in another library's form: `python -m tsae.export RUN --to saelens|dictionary_learning --out DIR`."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from tsae.errors import UserError
from tsae.evaluation.held_out import held_out, source_of
from tsae.formats import dictionary_learning, load
from tsae.formats.forms import common_architecture, without_hysteresis
from tsae.rundir import layout
from tsae.rundir.directory import read_config
from tsae.sae.model import SparseAutoencoder
from tsae.sae.release import with_release_ratio
from tsae.utils.atomic import WriteError
from tsae.utils.cli import parse, report_errors
from tsae.utils.config_json import load_json
from tsae.utils.progress import console

MEASURED = (layout.EVALUATION, layout.EVALUATION_SOURCE, layout.SPARSITY)


@dataclass
class Arguments:
    """Write a run's autoencoder in another library's form, with its metrics."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run directory, or an autoencoder in any known format."""
    to: Literal["saelens", "dictionary_learning"]
    """saelens: cfg.json and sae_weights.safetensors; dictionary_learning: trainer_0/ae.pt and config.json."""
    out: Path
    """The directory to write, new or empty."""
    drop_hysteresis: bool = False
    """Export a plain threshold in place of hysteresis, which no other library computes: the one that keeps as many
    features active on a sample of the run's training text. Its metrics are measured anew, on the run's evaluation
    text, and stand in eval.json beside it."""


def export(arguments: Arguments) -> Path:
    """Do as ``arguments`` say; the directory written, which is whole or not there.

    Raises:
        UserError: the other library has no form for the autoencoder, ``out`` holds something, or what is needed to
            measure anew cannot be read.
    """
    out, library = arguments.out, {"saelens": "SAELens"}.get(arguments.to, arguments.to)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty directory; name a new one.")
    source = Path(arguments.source).expanduser()
    sae = load(arguments.source)
    run = source if (source / layout.CONFIG).is_file() and (source / layout.AUTOENCODER).is_dir() else None
    dropping = arguments.drop_hysteresis and sae.cfg.kind.release
    common_architecture(without_hysteresis(sae) if dropping else sae, library)
    metadata = _metadata(source if run is None else run / layout.AUTOENCODER)
    with _directory(out) as directory:
        if dropping:
            if run is None:
                raise UserError(f"{source} is not a run's directory, which --drop-hysteresis needs to measure anew.")
            sae, factor = _measured_without_hysteresis(sae, run, directory)
            metadata |= {"hysteresis_dropped": {"threshold_factor": factor}}
        elif run is not None:
            _copy_measured(run, directory)
        _writers()[arguments.to](without_hysteresis(sae), directory, metadata)
        sparsity = directory / layout.SPARSITY
        if arguments.to == "saelens" and sparsity.is_file():  # SAELens has it beside the weights
            sparsity.rename(directory / sparsity.name)
        shutil.rmtree(directory / layout.AUTOENCODER, ignore_errors=True)
    return out


def _writers() -> dict[str, Callable[[SparseAutoencoder, Path, dict[str, Any]], None]]:
    return {
        "saelens": lambda sae, directory, metadata: sae.save(directory, **metadata),
        "dictionary_learning": dictionary_learning.write,
    }


def _metadata(directory: Path) -> dict[str, Any]:
    """What a directory in SAELens's format says of the model and the text; nothing for others."""
    if not (directory / "cfg.json").is_file():
        return {}
    metadata = load_json(directory / "cfg.json").get("metadata") or {}
    own = ("tsae", "sae_lens_version", "sae_lens_training_version")
    return {name: value for name, value in metadata.items() if name not in own}


def _copy_measured(run: Path, directory: Path) -> None:
    """The run's metrics: the exported autoencoder computes the same."""
    for name in MEASURED:
        if (run / name).is_file():
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(run / name, directory / name)


def _measured_without_hysteresis(sae: SparseAutoencoder, run: Path, directory: Path) -> tuple[SparseAutoencoder, float]:
    """``sae`` with a plain threshold, and the factor on its own; its metrics go into ``directory``."""
    from tsae.evaluate import training_sample
    from tsae.evaluation.evaluator import check_width, evaluate, evaluation_options, evaluation_progress, write_eval
    from tsae.lm.loading import load_language_model

    config = read_config(run)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    lm = load_language_model(config.model, device=device, dtype=config.lm_dtype, revision=config.revision)
    check_width(sae, lm, str(run))

    _, factor, l0 = with_release_ratio(sae, 1.0, training_sample(config, lm))
    if l0 == 0:
        raise UserError("No feature is active on the run's training text, so no threshold can be found; check the run.")
    plain = without_hysteresis(sae, factor)
    own = source_of(config, None, None)
    batch, _, source = held_out(config, own, lm, config.evaluation.sequences, config.stream_seed)
    with evaluation_progress() as progress:
        result = evaluate(plain.to(lm.device), lm, [batch], **evaluation_options(config), progress=progress)
    write_eval(result, directory, source)
    return plain.cpu(), factor


@contextmanager
def _directory(out: Path) -> Iterator[Path]:
    """A temporary neighbour of ``out`` that takes its place when the block ends without an error."""
    temporary = out.absolute().with_name(f".{out.absolute().name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed export
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, out.absolute())
    except (OSError, WriteError) as error:
        reason = error.reason if isinstance(error, WriteError) else error.strerror
        raise UserError(f"{out} cannot be written ({reason}); name another directory.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status, 2 for bad input."""
    with report_errors() as status:
        arguments = parse(Arguments, sys.argv[1:] if argv is None else argv, None, "python -m tsae.export")
        console.print(f"Written: {export(arguments)}", soft_wrap=True)
    return status.code


if __name__ == "__main__":
    sys.exit(main())
