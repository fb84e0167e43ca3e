"""Named configurations: `demo` and the settings of the two papers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tsae.config import (
    MAX_LENGTH,
    BufferConfig,
    CheckpointConfig,
    EvaluationConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SAEConfig,
    TextConfig,
    TrainConfig,
)
from tsae.errors import UserError
from tsae_kernels import MULTISCALE


def demo() -> TrainConfig:
    """Gemma-3-270m, layer 9, on the Python installation's own text: minutes on two CPU cores.

    The activation `rate` with a contrastive and a window term, as measured in docs/results.md.
    """
    base = demo_hysteresis()
    return replace(
        base,
        preset="demo",
        sae=replace(base.sae, activation="rate", release_ratio=0.1, amplitude_bits=6.0, gate_gradient=0.4),
        objective=replace(
            base.objective,
            contrastive_weight=1.5,  # lowers pooled differences
            window_weight=0.015,  # keeps features smooth
            dead_after_tokens=30_000,  # rare features have the highest thresholds: revive them sooner
            aux_weight=1 / 8,
        ),
    )


def demo_hysteresis() -> TrainConfig:
    """The earlier demo: one threshold with hysteresis, and temporal terms.

    The hysteresis activation with a contrastive and a window term, as measured in docs/results.md, with TSAE's
    schedules shortened.
    """
    return TrainConfig(
        preset="demo-hysteresis",
        model="gemma-3-270m",
        layer=9,
        data="python-docs",
        steps=800,
        batch=8,
        sae=SAEConfig(d_sae=2560, activation="schmitt", k=36, release_ratio=0.4, encoder_scale=0.25),
        objective=ObjectiveConfig(
            temporal="contrastive+window",
            contrastive_weight=2.0,  # lowers pooled differences
            window_weight=0.02,  # keeps features smooth
            l1=0.0,  # the steered threshold sets the sparsity
            boost=1.0,
            hold_steps=200,
            ramp_steps=200,
            dead_after_tokens=60_000,
        ),
        # The norm is about 20; rare tokens with huge activations raise it to thousands and would kill features.
        optimizer=OptimizerConfig(
            name="adam", lr=1.15e-3, betas=(0.9, 0.99), warmup_steps=20, schedule="linear", clip_norm=30.0
        ),
        buffer=BufferConfig(sequences=1024, reuse=12, estimate_sequences=128),
        evaluation=EvaluationConfig(sequences=128, ce_sequences=8),
        checkpoint=CheckpointConfig(every=400),
    )


def demo_smollm2() -> TrainConfig:
    """SmolLM2-135M-Instruct, layer 15: the demo on a model of another family, under a free licence.

    Without BOS the model gives a norm 100 times the others' to the first position, and to some second ones. BOS keeps
    it from the text, and the predictions are as good (docs/metrics.md, "Where they are").
    """
    base = demo()
    return replace(
        base,
        preset="demo-smollm2",
        model="smollm2-135m-instruct",
        layer=15,
        sae=replace(base.sae, d_sae=2304),
        text=TextConfig(prepend_bos="yes"),
    )


def tsae_gemma_2_2b() -> TrainConfig:
    """TSAE (the Gemma-2-2B paper): its hyperparameters, on centred and scaled input."""
    return TrainConfig(
        preset="tsae-gemma-2-2b",
        model="google/gemma-2-2b",  # section 5: "Gemma-2B", hidden dimension 2304
        layer=12,  # section 5: "intermediate layer"; 12 of 26 is our reading
        data="monology/pile-uncopyrighted",  # section 5.1: the Pile
        steps=20_000,  # not stated; ten times the warm-up
        batch=16,  # section 5.1: batch size 2048, read as tokens: 16 sequences of 128
        sae=SAEConfig(
            d_sae=2304,  # section 5: 2304 is "both input and sparse feature space dimensions"
            activation="relu",  # section 3.1 leaves f open and cites ReLU as the common choice
            layer_norm="none",  # section 4.3 normalizes features; --sae.layer-norm post is that variant
            unit_norm_decoder=False,  # not in the paper
        ),
        objective=ObjectiveConfig(
            temporal="multiscale",  # section 4.1
            bands=MULTISCALE,  # section 4.1: offsets 1-3, 4-15, 16-127
            weights=(0.01, 0.005, 0.001),  # section 5.2
            adaptive=True,  # equation 3
            min_variance=0.01,  # section 4.1 and 5.2
            l1=0.04,  # section 4.3 and 5.1
            boost=2.0,  # equation 4
            hold_steps=1000,  # equation 4
            ramp_steps=1000,  # equation 4: 2000 steps of warm-up in all
            buffer_std=0.1,  # section 4.3
            buffer_mixing=0.25,  # section 4.3
            aux_weight=0.0,  # not in the paper
        ),
        optimizer=OptimizerConfig(
            name="adamw",  # section 4.3
            lr=3e-4,  # section 4.3
            schedule="constant",  # no decay is stated
            clip_norm=2.0,  # section 4.2
            noise_eta=0.01,  # section 4.2: "noise injection during warmup"; eta as in Neelakantan et al. 2015
            noise_steps=2000,  # section 4.2: the warm-up
        ),
        buffer=BufferConfig(sequences=2048),
        text=TextConfig(column="text"),
        checkpoint=CheckpointConfig(every=1000),
    )


def tcsae_pythia_70m() -> TrainConfig:
    """TC-SAE (the Pythia-70m paper): its hyperparameters, on centred and scaled input."""
    return TrainConfig(
        preset="tcsae-pythia-70m",
        model="EleutherAI/pythia-70m",  # section 5
        layer=4,  # section 5
        data="Skylion007/openwebtext",  # section 5: OpenWebText
        steps=20_000,  # not stated
        batch=32,  # section 5: "batch size of 32", of sequences of 128 tokens
        sae=SAEConfig(
            d_sae=512,  # not stated; an L0 of 249 under GELU is half of 512
            activation="gelu",  # equation 1
            init="xavier",  # section 4
            unit_norm_decoder=True,  # section 4
            apply_b_dec_to_input=False,  # equation 1
        ),
        objective=ObjectiveConfig(
            temporal="window",  # equation 3
            window=3,  # section 4
            window_weight=0.01,  # equation 4, lambda_2
            l1=0.1,  # equation 4, lambda_1
            boost=1.0,  # not in the paper
            hold_steps=0,  # the temporal term is on from the first step
            ramp_steps=0,
            aux_weight=0.0,  # not in the paper
        ),
        optimizer=OptimizerConfig(
            name="adam",  # section 5
            lr=3e-4,  # section 5
            warmup_steps=1000,  # section 5
            schedule="cosine",  # section 5
            clip_norm=2.0,  # section 5, runs 1 and 2: "gradient clipping"; the norm is TSAE's
        ),
        buffer=BufferConfig(sequences=2048),  # section 5: "buffer size of 2048 sequences"
        checkpoint=CheckpointConfig(every=1000),
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "demo": demo,
    "demo-hysteresis": demo_hysteresis,
    "demo-smollm2": demo_smollm2,
    "tsae-gemma-2-2b": tsae_gemma_2_2b,
    "tcsae-pythia-70m": tcsae_pythia_70m,
}
"""Name -> a function that returns its configuration."""


def preset(name: str) -> TrainConfig:
    """A fresh copy of the preset's configuration. Raises `UserError`, listing the presets, for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]()


SEQUENCE_COUNTS = {
    "": ("batch", "chunk"),
    "buffer": ("sequences", "harvest_batch", "estimate_sequences", "ahead"),
    "evaluation": ("sequences", "ce_sequences", "lm_batch"),
}
"""Options that count sequences, by the group of options they are in."""


def at_length(cfg: TrainConfig, length: int) -> TrainConfig:
    """``cfg`` with sequences of ``length`` tokens, and as many tokens in a batch, the buffer and the evaluation.

    The options in `SEQUENCE_COUNTS` are multiplied by ``cfg.length / length`` and rounded, to at least 1; values below
    1, which have other meanings, stay. The last of ``objective.bands``, if it ends with the sequence, does so again; at
    lengths below 128 it keeps the 127 of `MULTISCALE`, which there compares the same pairs.

    Raises:
        UserError: there is no such length.
    """
    if not 2 <= length <= MAX_LENGTH:
        raise UserError(f"length is {length}; it must be from 2 to {MAX_LENGTH}.")
    if length == cfg.length:
        return cfg

    def scaled(part: object, names: tuple[str, ...]) -> dict[str, Any]:
        counts = {name: getattr(part, name) for name in names}
        return {name: max(1, round(n * cfg.length / length)) if n > 0 else n for name, n in counts.items()}

    return replace(
        cfg,
        length=length,
        **scaled(cfg, SEQUENCE_COUNTS[""]),
        buffer=replace(cfg.buffer, **scaled(cfg.buffer, SEQUENCE_COUNTS["buffer"])),
        evaluation=replace(cfg.evaluation, **scaled(cfg.evaluation, SEQUENCE_COUNTS["evaluation"])),
        objective=replace(cfg.objective, bands=_bands_at_length(cfg, length)),
    )


def _bands_at_length(cfg: TrainConfig, length: int) -> tuple[tuple[int, int], ...]:
    *inner, (low, high) = cfg.objective.bands or [(0, 0)]
    end = max(length - 1, MULTISCALE[-1][1])
    if high < cfg.length - 1 or low > end:
        return cfg.objective.bands
    return (*inner, (low, end))
