"""The features whose memory saves the most bits, with passages in which they last: a page to look at.

    python -m experiments.lasting_features RUN docs/lasting-features.md

Features are ranked by the bits per token that the memory of one token saves on held-out text,

    H(d) - [d H(p11) + (1 - d) H(p01)],

the mutual information between a feature's states at neighbouring tokens (docs/metrics.md); d is the share of tokens at
which it is on. A table has the five first. Those are dense, so passages are shown of the five first that are on at
most at a tenth of the tokens: each with its longest stretches, at most one per document. No choice is made.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import html
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from tsae.data.harvest import content_activations
from tsae.evaluation.held_out import evaluation_batches
from tsae.evaluation.subject import open_run
from tsae.utils.atomic import atomic_write
from tsae.view.data import content_tokens, token_texts
from tsae.view.features import Activity

FEATURES, PASSAGES, BEFORE, WIDTH = 5, 3, 8, 48  # WIDTH: tokens of a passage, BEFORE of them ahead of the stretch
LEAST = 20  # activations; with fewer the rates say little
DENSE = 0.1  # share of tokens


def entropy(p: np.ndarray) -> np.ndarray:
    """Bits of a coin, elementwise; 0 at 0 and 1."""
    p = np.clip(p, 1e-300, 1 - 1e-16)
    return np.asarray(-p * np.log2(p) - (1 - p) * np.log2(1 - p))


def saved_bits(on: np.ndarray, run: np.ndarray) -> tuple[float, float, float]:
    """Bits per token that memory saves, P(on), and P(on | on before), of one feature.

    on: (n) bool; run: (n) the segment run of each token, -1 where excluded
    """
    pair = (run[1:] == run[:-1]) & (run[1:] >= 0)
    before, after = on[:-1][pair], on[1:][pair]
    if not before.any() or before.all():
        return 0.0, float(on[run >= 0].mean()), float(before.all())
    p11, p01, d = after[before].mean(), after[~before].mean(), before.mean()
    return float(entropy(d) - d * entropy(p11) - (1 - d) * entropy(p01)), float(on[run >= 0].mean()), float(p11)


def stretches(on: np.ndarray, run: np.ndarray) -> list[tuple[int, int]]:
    """(first position, tokens) of the uninterrupted stretches at which a feature is on, the longest first."""
    number = np.where(on & (run >= 0), run, -1)
    starts = np.flatnonzero((number >= 0) & (np.diff(number, prepend=-2) != 0))
    changes = np.flatnonzero(np.diff(number, append=-2) != 0)
    ends = changes[np.searchsorted(changes, starts)]
    lengths = ends - starts + 1
    return [(int(starts[i]), int(lengths[i])) for i in np.lexsort((starts, -lengths))]


def documents(run: np.ndarray, length: int) -> np.ndarray:
    """The document of each token: a segment at the start of a row continues the one at the end of the row before.

    run: (n) the segment run of each token of rows of ``length`` tokens, -1 where excluded
    out: (n) numbers of documents; two documents that meet at the end of a row count as one
    """
    begins = np.diff(run, prepend=-2) != 0
    row = np.arange(len(run)) % length == 0
    continues = row & (np.append(-1, run[:-1]) >= 0) & (run >= 0)
    return np.cumsum(begins & ~continues)


def passage(start: int, on: np.ndarray, run: np.ndarray, tokens: list[str]) -> str:
    """The tokens around a stretch, within its segment, as HTML in which those where the feature is on are marked."""
    inside = np.flatnonzero(run == run[start])
    first = max(start - BEFORE, int(inside[0]))
    shown = range(first, min(first + WIDTH, int(inside[-1]) + 1))
    parts = [f"<mark>{html.escape(tokens[i])}</mark>" if on[i] else html.escape(tokens[i]) for i in shown]
    return "".join(parts).replace("</mark><mark>", "").replace("\n", "⏎\n")


@torch.no_grad()
def activity(run: Path) -> tuple[Activity, list[str]]:
    """The features of a run on its held-out text, and the text's tokens."""
    subject = open_run(run)
    cfg, sae, lm = subject.config, subject.sae, subject.load_lm()
    batches = evaluation_batches(cfg, lm, cfg.evaluation.sequences)
    found = Activity(sae.cfg.d_sae, cfg.length)
    for batch in batches:
        x = content_activations(lm, batch, cfg.place).float()
        found.update(sae.encode(x, batch.segments), batch.segments)
    found.finish()
    index, texts = token_texts(lm.tokenizer, torch.cat([content_tokens(batch) for batch in batches]))
    return found, [texts[i] for i in index]


def page(found: Activity, tokens: list[str], run_name: str) -> Iterator[str]:
    """The page's lines."""
    bounds = np.searchsorted(found.feature, np.arange(found.d_sae + 1))
    states = {}
    for feature in range(found.d_sae):
        positions = found.position[bounds[feature] : bounds[feature + 1]]
        if len(positions) >= LEAST:
            on = np.zeros(len(tokens), bool)
            on[positions] = True
            states[feature] = on
    facts = {feature: saved_bits(on, found.run) for feature, on in states.items()}
    document = documents(found.run, found.segments.shape[1])
    ranked = sorted(facts, key=lambda feature: -facts[feature][0])
    sparse = [feature for feature in ranked if facts[feature][1] <= DENSE]
    yield "# Five features that last\n"
    yield (
        f"Of {len(ranked):,} features of `{run_name}` that are on at {LEAST} or more of {len(tokens):,} held-out "
        "tokens, those whose memory of one token saves the most bits (`experiments/lasting_features.py`):\n"
    )
    yield "| feature | bits saved per token | on | on, given on before | stretches | median tokens | most |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for feature in dict.fromkeys([*ranked[:FEATURES], *sparse[:FEATURES]]):
        saved, share, stays = facts[feature]
        lengths = [length for _, length in stretches(states[feature], found.run)]
        numbers = f"{saved:.3f} | {share:.1%} | {stays:.0%} | {len(lengths)} | {int(np.median(lengths))} | {lengths[0]}"
        yield f"| {feature} | {numbers} |"
    yield (
        f"\nThe {FEATURES} first of all, then the {FEATURES} first of those that are on at most at {DENSE:.0%} of the "
        f"tokens. Of these the longest stretches in {PASSAGES} documents; marked: it is on; ⏎ is a line break.\n"
    )
    for place, feature in enumerate(sparse[:FEATURES], 1):
        on = states[feature]
        seen: set[int] = set()
        yield f"## {place}. Feature {feature}\n"
        for start, length in stretches(on, found.run):
            if document[start] in seen or len(seen) == PASSAGES:
                continue
            seen.add(document[start])
            yield f"{length} tokens:\n\n<pre>{passage(start, on, found.run, tokens)}</pre>\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("page", type=Path)
    arguments = parser.parse_args()
    found, tokens = activity(arguments.run)
    text = "\n".join(page(found, tokens, arguments.run.resolve().name))
    with atomic_write(arguments.page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"Written: {arguments.page}")


if __name__ == "__main__":
    main()
