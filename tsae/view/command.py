"""From a run to its page: the language model and the autoencoder over held-out text, then one HTML file."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from tsae.data.harvest import content_activations
from tsae.evaluation.held_out import evaluation_batches
from tsae.evaluation.subject import open_run
from tsae.presets import at_length
from tsae.rundir import layout
from tsae.rundir.ownership import check_output, owning_runs
from tsae.utils.cli import check_counts
from tsae.utils.output import say
from tsae.utils.progress import bar
from tsae.view.data import content_tokens, page_data, token_texts
from tsae.view.features import Activity
from tsae.view.page import cannot_write_page, write_page


def view(run: Path, out: Path | None = None, tokens: int | None = None, length: int | None = None) -> None:
    """Write the page of a finished run.

    out: the file; None writes RUN/view.html
    tokens: of held-out text; None takes as many as the run's evaluation
    length: of the sequences; None takes the run's

    Raises:
        UserError: the directory is not a run's, the model or the text cannot be read, or the file cannot be written.
    """
    if out is not None:
        check_output(out, own=layout.PAGE)
    out = run / layout.PAGE if out is None else out
    with owning_runs(run, out.parent):
        _check_writable(out)
        size = write_page(collect(run, tokens, length), out)
    say(f"Written: {out} ({size / 1e6:.1f} MB)")


def _check_writable(page: Path) -> None:
    """Raise `UserError` now, rather than once the features are computed, if the file cannot be created."""
    place = page.absolute().parent
    if place.is_dir() and not page.exists():
        try:
            with TemporaryFile(dir=place):
                pass
        except OSError as error:
            raise cannot_write_page(page, error.strerror or str(error)) from None


@torch.no_grad()
def collect(run: Path, tokens: int | None = None, length: int | None = None) -> dict[str, Any]:
    """The content of the page, from the run's directory and its features on held-out text."""
    check_counts(tokens=tokens)
    subject = open_run(run)
    own, sae = subject.config, subject.sae
    subject.config = cfg = at_length(own, own.length if length is None else length)
    lm = subject.load_lm()
    sequences = cfg.evaluation.sequences if tokens is None else math.ceil(tokens / cfg.length)
    batches = evaluation_batches(cfg, lm, sequences)
    activity = Activity(sae.cfg.d_sae, cfg.length)
    with bar("Features", sum(batch.segments.numel() for batch in batches)) as advance:
        for batch in batches:
            segments = batch.segments.to(lm.device)
            x = content_activations(lm, batch, cfg.place).to(lm.device, torch.float32)
            activity.update(sae.encode(x, segments), segments)
            advance(segments.numel())
    activity.finish()
    ids, texts = token_texts(lm.tokenizer, torch.cat([content_tokens(batch) for batch in batches]))
    return page_data(run, own, sae, activity, ids, texts)
