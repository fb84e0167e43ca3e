"""Train a SAELens SAE with a temporal objective in SAELens's trainer, on complete sequences.

    python examples/train_with_sae_lens.py --model gemma-3-270m --layer 9 --data python-docs --out sae-lens-run

writes OUT/sae, an ordinary `topk` SAE on raw activations that both SAELens and `tsae.load` read. Evaluate it with

    python -m tsae.evaluate OUT/sae --model gemma-3-270m --layer 9
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

import tsae
from tsae.data.harvest import Harvester
from tsae.data.sequences import SequenceStream
from tsae.data.text import open_text
from tsae.integrations.sae_lens import SequenceBatches, TemporalTopKTrainingSAE, TemporalTopKTrainingSAEConfig
from tsae.lm.loading import load_language_model
from tsae.lm.trial_run import site_width
from tsae.sae.normalization import InputNormalizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--layer", type=int, default=9)
    parser.add_argument("--data", default="python-docs")
    parser.add_argument("--out", type=Path, default=Path("sae-lens-run"))
    parser.add_argument("--d-sae", type=int, default=2560)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=16, help="sequences of 128 tokens per step")
    parser.add_argument("--temporal", default="contrastive", help="contrastive, multiscale, window or slow")
    parser.add_argument("--coefficient", type=float, default=10.0, help="weight of the temporal term")
    options = parser.parse_args()

    lm = load_language_model(options.model)
    stream = SequenceStream(lambda epoch: open_text(options.data, part="train", seed=0, epoch=epoch), lm.tokenizer, 128)
    harvester = Harvester(lm, options.layer, stream)
    sample = harvester.take(64)
    normalizer = InputNormalizer.estimate(sample.x, sample.segments)
    batches = SequenceBatches((harvester.take(options.batch) for _ in itertools.count()), normalizer)

    sae = TemporalTopKTrainingSAE(
        TemporalTopKTrainingSAEConfig(
            d_in=site_width(lm, options.layer),
            d_sae=options.d_sae,
            k=options.k,
            temporal=options.temporal,
            temporal_coefficient=options.coefficient,
        )
    )
    sae.follow(batches)
    tokens = options.batch * 128
    trainer_config = SAETrainerConfig(
        total_training_samples=options.steps * tokens, train_batch_size_samples=tokens, lr=1e-3, lr_end=1e-4
    )
    SAETrainer(trainer_config, sae, batches).fit()

    # SAELens's SAE takes normalized activations; fold the normalization into the weights.
    sae.save_inference_model(options.out / "normalized")
    folded = tsae.load(options.out / "normalized").folded(normalizer.mean, normalizer.scale)
    folded.save(options.out / "sae", model_name=options.model, hook_name=f"blocks.{options.layer}.hook_resid_post")


if __name__ == "__main__":
    main()
