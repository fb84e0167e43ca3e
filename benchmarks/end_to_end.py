"""Time from text to a trained autoencoder: tsae and SAELens on the same text, model, layer, sizes and tokens.

    make peers
    python -m benchmarks.end_to_end [--tokens 65536] [--reuse 1] [--rounds 2] [--json FILE]

Each side runs in its own process, one after the other. Both read the same documents (the Python installation's text, as
JSON lines), run Gemma-3-270m to layer 9 in the same dtype (SAELens in its default `HookedTransformer`, which also stops
at that layer), and train 2,560 features, 36 of them active, on the same number of tokens in batches of 1,024 under the
same autocast. tsae uses the demo's activation and temporal objective; SAELens's TopK uses neither.

With --reuse R > 1, one token in R is harvested and trained on R times: by tsae from its buffer, by SAELens from the
activations that its `CacheActivationsRunner` writes to disk.

The total counts from the start of the run to the saved autoencoder, without importing libraries and without loading the
language model, which is reported separately.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

LAYER, WIDTH, D_SAE, K = 9, 640, 2560, 36
BATCH, LENGTH = 8, 128  # sequences, tokens
HARVEST_BATCH = 16  # sequences per forward pass
LOADING, TEXT, MODEL, TRAINING = "loading the language model", "text to tokens", "language model", "training"
STORED = "activations to and from disk"
PARTS = (TEXT, MODEL, STORED, TRAINING)
REST = "the rest"
PEER_NAME = "google/gemma-3-270m"  # the name from which TransformerLens infers the architecture


class Parts:
    """Seconds spent in wrapped functions, by part. A wrapped function called by another one counts only once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    def wrap(self, owner: Any, name: str, part: str) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - start
                self.seconds[part] += spent - self._inner.pop()
                self._inner[-1] += spent

        setattr(owner, name, timed)


def ours(text: Path, tokens: int, reuse: int, scratch: Path) -> dict[str, float]:
    """A run of `python -m tsae.train demo`, without evaluation and checkpoints."""
    from dataclasses import replace

    import tsae.data.sequences
    import tsae.lm.hooks
    import tsae.lm.loading

    parts = Parts()
    parts.wrap(tsae.lm.loading, "load_language_model", LOADING)
    parts.wrap(tsae.lm.hooks, "activations", MODEL)
    parts.wrap(tsae.data.sequences.SequenceStream, "next_batch", TEXT)
    import tsae.training.run  # after wrapping, so that it imports the wrapped functions
    import tsae.training.trainer
    from tsae.presets import preset

    parts.wrap(tsae.training.trainer.Trainer, "train_step", TRAINING)
    cfg = preset("demo")
    cfg = replace(
        cfg,
        data=str(text),
        steps=tokens // (BATCH * LENGTH),
        batch=BATCH,
        buffer=replace(cfg.buffer, reuse=reuse, harvest_batch=HARVEST_BATCH),
        evaluation=replace(cfg.evaluation, final=False),
        checkpoint=replace(cfg.checkpoint, every=0),
    )
    start = time.perf_counter()
    tsae.training.run.run(cfg, scratch / "run")
    return _measured(parts, time.perf_counter() - start)


def sae_lens(text: Path, tokens: int, reuse: int, scratch: Path) -> dict[str, float]:
    """A run of SAELens's `LanguageModelSAETrainingRunner`, after its `CacheActivationsRunner` if tokens are reused."""
    import sae_lens
    import sae_lens.cache_activations_runner
    import sae_lens.llm_sae_training_runner
    import torch
    from datasets import Dataset
    from sae_lens.training.activations_store import ActivationsStore
    from sae_lens.training.sae_trainer import SAETrainer

    from tsae.lm.gemma_package import GEMMA
    from tsae.lm.loading import default_dtype

    dtype = default_dtype("cpu")
    (scratch / "google").mkdir()
    (scratch / PEER_NAME).symlink_to(GEMMA.folder())
    os.chdir(scratch)  # so that its loader finds the folder under the model's hub name
    parts = Parts()
    parts.wrap(sae_lens.llm_sae_training_runner, "load_model", LOADING)
    parts.wrap(sae_lens.cache_activations_runner, "load_model", LOADING)
    parts.wrap(ActivationsStore, "get_batch_tokens", TEXT)
    parts.wrap(ActivationsStore, "get_activations", MODEL)
    parts.wrap(ActivationsStore, "_load_raw_llm_batch_from_cached", STORED)
    parts.wrap(SAETrainer, "step", TRAINING)
    rows = [json.loads(line) for line in text.read_text().splitlines()]
    documents = Dataset.from_list(rows)
    common: dict[str, Any] = {
        "model_name": PEER_NAME,
        "hook_name": f"blocks.{LAYER}.hook_resid_post",
        "context_size": LENGTH + 1,  # the first position is BOS, excluded below
        "streaming": False,
        "prepend_bos": True,
        "model_from_pretrained_kwargs": {"dtype": str(dtype).removeprefix("torch.")},
        "dataset_path": str(text),
        "device": "cpu",
    }
    start = time.perf_counter()
    cached = None
    if reuse > 1:
        cached = str(scratch / "activations")
        _cache_activations(common, documents, -(-tokens // reuse), cached, parts)
    cfg: Any = sae_lens.LanguageModelSAERunnerConfig(
        **common,
        sae=sae_lens.TopKTrainingSAEConfig(d_in=WIDTH, d_sae=D_SAE, k=K),
        is_dataset_tokenized=False,
        training_tokens=tokens,
        train_batch_size_tokens=BATCH * LENGTH,
        store_batch_size_prompts=HARVEST_BATCH,
        exclude_special_tokens=True,
        use_cached_activations=reuse > 1,
        cached_activations_path=cached,
        autocast=dtype == torch.bfloat16,
        lr=1.15e-3,
        n_eval_batches=0,
        n_checkpoints=0,
        checkpoint_path=None,
        output_path=str(scratch / "sae"),
        logger=sae_lens.LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    runner = sae_lens.LanguageModelSAETrainingRunner(cfg, override_dataset=documents)
    runner.run()
    return _measured(parts, time.perf_counter() - start)


def _cache_activations(common: dict[str, Any], documents: Any, tokens: int, folder: str, parts: Parts) -> None:
    """Write the activations of at least ``tokens`` tokens with SAELens's `CacheActivationsRunner`."""
    import sae_lens

    batches = -(-tokens // (HARVEST_BATCH * LENGTH))
    harvested = batches * HARVEST_BATCH * (LENGTH + 1)  # including BOS
    runner = sae_lens.CacheActivationsRunner(
        sae_lens.CacheActivationsRunnerConfig(
            **common,
            d_in=WIDTH,
            training_tokens=harvested,
            model_batch_size=HARVEST_BATCH,
            new_cached_activations_path=folder,
            dtype="float32",
            buffer_size_gb=(harvested + 0.5) * WIDTH * 4 / 1e9,  # it only harvests complete buffers
        ),
        override_dataset=documents,
    )
    parts.wrap(runner, "_create_shard", STORED)
    runner.run()


def _measured(parts: Parts, total: float) -> dict[str, float]:
    loading = parts.seconds.pop(LOADING, 0.0)
    out = {part: parts.seconds.get(part, 0.0) for part in PARTS}
    return out | {REST: total - loading - sum(out.values()), "in all": total - loading, LOADING: loading}


SIDES = {"tsae": ours, "SAELens": sae_lens}


def write_documents(path: Path, tokens: int) -> None:
    """Write documents of the Python installation as JSON lines, well over ``tokens`` at four characters each."""
    from tsae.config import TextConfig
    from tsae.data.text import open_text

    characters = 0
    with path.open("w") as file:
        for document in open_text("python-docs", part="train", seed=0, config=TextConfig(), epoch=0):
            file.write(json.dumps({"text": document.text}) + "\n")
            characters += len(document.text)
            if characters > 8 * tokens + 100_000:
                break


def table(results: dict[str, dict[str, float]], tokens: int) -> str:
    """A Markdown table of both sides' seconds by part."""
    lines = ["| part | " + " | ".join(f"{side}, s | share" for side in results) + " |", "| --- " + "| --- " * 4 + "|"]
    for part in (*PARTS, REST, "in all"):
        cells = [f"{r[part]:.1f} | {r[part] / r['in all']:.0%}" for r in results.values()]
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    lines.append("| tokens/s | " + " | ".join(f"{tokens / r['in all']:,.0f} | " for r in results.values()) + " |")
    lines.append(f"| {LOADING} | " + " | ".join(f"{r[LOADING]:.1f} | " for r in results.values()) + " |")
    ratio = results["SAELens"]["in all"] / results["tsae"]["in all"]
    return "\n".join(lines) + f"\n\nFrom text to a trained autoencoder tsae is {ratio:.2f} times as fast."


def main() -> None:
    """Run both sides alternately and print the medians over the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65_536, help="tokens to train on in total")
    parser.add_argument("--reuse", type=int, default=1, help="times to train on each harvested token")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--text", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        found = SIDES[arguments.side](arguments.text, arguments.tokens, arguments.reuse, arguments.scratch)
        print(json.dumps(found))
        return
    rounds: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.jsonl"
        write_documents(text, arguments.tokens // arguments.reuse)
        for number in range(arguments.rounds):
            for side in SIDES:
                scratch = Path(folder) / f"{side}-{number}"
                scratch.mkdir()
                command = [sys.executable, "-m", "benchmarks.end_to_end", *sys.argv[1:]]
                command += ["--side", side, "--text", str(text), "--scratch", str(scratch)]
                environment = os.environ | {"HF_HUB_OFFLINE": "1"}
                done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True, check=True)
                rounds[side].append(json.loads(done.stdout.splitlines()[-1]))
    results = {side: {part: median(r[part] for r in all_) for part in all_[0]} for side, all_ in rounds.items()}
    import torch

    versions = {name: importlib.metadata.version(name) for name in ("torch", "sae-lens", "transformer-lens")}
    about = {"tokens": arguments.tokens, "reuse": arguments.reuse, "rounds": arguments.rounds, "versions": versions}
    about |= {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    print(json.dumps(about))
    print(table(results, arguments.tokens))
    if arguments.json:
        arguments.json.write_text(json.dumps(about | {"results": results}) + "\n")


if __name__ == "__main__":
    main()
