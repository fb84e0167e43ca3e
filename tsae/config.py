"""The configuration of a run: nested dataclasses that Python reads and the command line overrides.

Field docstrings become the text of ``--help``. Nothing here computes anything but checks of its own values.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from tsae.data.text import TextConfig
from tsae.errors import UserError
from tsae.sae.kinds import KINDS, Activation, Kind
from tsae_kernels import MULTISCALE

LENGTH = 128  # content tokens per sequence

TEMPORAL = ("multiscale", "window", "contrastive", "slow")  # what objective.temporal joins


@dataclass
class SAEConfig:
    """Architecture of a sparse autoencoder."""

    d_in: int = 0
    """Width of the activations; 0 takes it from the language model."""
    d_sae: int = 2560
    """Number of features."""
    activation: Activation = "schmitt"
    """Nonlinearity of the encoder; `schmitt` is the hysteresis trigger: on above a threshold, off below a
    lower release, along the sequence. `jumprelu` learns a threshold for every feature, `jumprelu_schmitt` a
    threshold and a release."""
    k: int = 32
    """Features active per token: exact (topk), on average (batchtopk), or the target (schmitt; jumprelu and
    jumprelu_schmitt with objective.l0 0)."""
    release_ratio: float = 0.3
    """schmitt: the release threshold as a share of the switch-on threshold, 0 to 1 (1: no hysteresis);
    jumprelu_schmitt starts from it."""
    hysteresis: Literal["causal", "two-sided"] = "causal"
    """schmitt: `causal` holds a feature on after it has switched on; `two-sided` before that too, which takes a look
    ahead and two passes more."""
    steering: Literal["controller", "exact"] = "controller"
    """schmitt: where the threshold comes from. `controller` moves it a little each step; `exact` takes from every batch
    the one that gives it sae.k, hysteresis included, and for inference a running mean, as batchtopk does."""
    bandwidth: float = 0.5
    """jumprelu, jumprelu_schmitt: width of the straight-through window round a threshold, as a share of the
    threshold (Rajamanoharan et al. 2024, section 3)."""
    groups: tuple[int, ...] = ()
    """Matryoshka: ascending numbers of features, the last sae.d_sae; the first so many features must each
    reconstruct on their own (Bussmann et al. 2025). Empty: off."""
    layer_norm: Literal["none", "pre", "post"] = "none"
    """Layer normalization on features, before or after the nonlinearity (TSAE section 4.3)."""
    init: Literal["tied", "xavier"] = "tied"
    """Initial weights: `tied` draws unit decoder rows and transposes them into the encoder; `xavier` is
    Xavier uniform for both (TC-SAE section 4)."""
    encoder_scale: float = 1.0
    """tied: factor on the transposed decoder that the encoder starts from. Below 1 the first reconstructions do not
    overshoot, and features come out more persistent."""
    unit_norm_decoder: bool = True
    """Keep the decoder's rows at norm 1, and take the gradient's component along them out (TC-SAE section 4)."""
    apply_b_dec_to_input: bool = True
    """Subtract `b_dec` from the input before the encoder."""
    input_scale: float = 1.0
    """The input is divided by this, the output multiplied. Set when weights are folded, for what is not
    homogeneous (gelu, layer normalization); 1 everywhere else."""

    @property
    def kind(self) -> Kind:
        """The properties of ``activation``."""
        return KINDS[self.activation]

    def check(self) -> None:
        """Raise `UserError` for a value that makes no sense."""
        if self.activation not in KINDS:
            raise UserError(f"sae.activation is {self.activation!r}; use {', '.join(KINDS)}.")
        if self.d_in < 0:
            raise UserError(f"sae.d_in is {self.d_in}; it must be positive, or 0 to take the model's width.")
        if self.d_sae < 1:
            raise UserError(f"sae.d_sae is {self.d_sae}; an autoencoder needs at least 1 feature.")
        if self.kind.k_sparse and not 1 <= self.k <= self.d_sae:
            raise UserError(f"sae.k is {self.k}; it must be from 1 to sae.d_sae, which is {self.d_sae}.")
        if not 0.0 <= self.release_ratio <= 1.0:
            raise UserError(f"sae.release_ratio is {self.release_ratio}; it must be from 0 to 1.")
        if not self.bandwidth > 0.0:
            raise UserError(f"sae.bandwidth is {self.bandwidth}; it must be positive.")
        if self.groups and (
            list(self.groups) != sorted(set(self.groups)) or self.groups[0] < 1 or self.groups[-1] != self.d_sae
        ):
            raise UserError(
                f"sae.groups is {self.groups}; it must be ascending numbers of features, the last of them sae.d_sae, "
                f"which is {self.d_sae}."
            )
        if (self.kind.steered or self.kind.learned) and self.layer_norm == "post":
            raise UserError(
                f"sae.layer_norm is 'post' with sae.activation '{self.activation}'; use 'pre' or 'none', as "
                "normalising after the threshold would undo its zeros."
            )
        if not self.kind.steered and (self.hysteresis, self.steering) != ("causal", "controller"):
            name = "steering" if self.hysteresis == "causal" else "hysteresis"
            raise UserError(
                f"sae.{name} is {getattr(self, name)!r} with sae.activation {self.activation!r}; only 'schmitt' has "
                "the choice."
            )
        if not self.encoder_scale > 0.0:
            raise UserError(f"sae.encoder_scale is {self.encoder_scale}; it must be positive.")
        if not self.input_scale > 0.0:
            raise UserError(f"sae.input_scale is {self.input_scale}; it must be positive.")


@dataclass
class ObjectiveConfig:
    """The loss: reconstruction, sparsity, temporal consistency, revival of dead features."""

    temporal: Annotated[
        str, tyro.conf.arg(aliases=["--objective"], metavar="{none," + ",".join(TEMPORAL) + "}[+...]")
    ] = "multiscale"
    """Temporal term: `multiscale` is TSAE equation 2, `window` TC-SAE equation 3, `contrastive` T-SAE's InfoNCE,
    `slow` one minus each feature's autocorrelation; `none`; or a sum of several, such as `contrastive+window`."""
    weight: float = 1.0
    """Factor on the whole temporal term, whichever it is."""
    group: int = 0
    """The temporal term looks at the first so many features only; 0 takes all."""
    bands: tuple[tuple[int, int], ...] = MULTISCALE
    """multiscale: inclusive ranges of token offsets, one per scale (TSAE section 4.1)."""
    weights: tuple[float, ...] = (0.01, 0.005, 0.001)
    """multiscale: weight of each band (TSAE section 5.2)."""
    adaptive: bool = True
    """multiscale: weigh features by their activation variance (TSAE equation 3)."""
    min_variance: float = 0.01
    """multiscale: features whose variance is below this are left out (TSAE section 4.1)."""
    window: int = 3
    """window: tokens in the sliding window, at least 2 (TC-SAE section 4)."""
    window_weight: float = 0.01
    """window: weight of the term (TC-SAE equation 4, lambda_2)."""
    contrastive_weight: float = 1.0
    """contrastive: weight of the term."""
    slow_weight: float = 1.0
    """slow: weight of the term."""
    offset: int = 1
    """contrastive: pairs are 1 to so many tokens apart, drawn at random (1: adjacent); slow: differences at
    offsets from 1 to this."""
    temperature: float = 0.1
    """contrastive: the cosine similarities are divided by this."""
    pairs: int = 256
    """contrastive: pairs drawn from each batch; 0 takes one for every token that has a neighbour."""
    negatives: Literal["all", "other-sequences"] = "all"
    """contrastive: a pair's negatives are all other pairs of the batch, or those of other sequences only."""
    l1: float = 0.04
    """Weight of the L1 penalty on features (TSAE section 4.3; TC-SAE equation 4, lambda_1)."""
    l0: float = 0.0
    """jumprelu, jumprelu_schmitt: weight of the L0 penalty (Rajamanoharan et al. 2024, section 3); 0 steers the
    thresholds' common factor so that the mean L0 is sae.k instead."""
    boost: float = 2.0
    """Factor on the reconstruction term until `hold_steps`, falling linearly to 1 over `ramp_steps`
    (TSAE equation 4)."""
    hold_steps: int = 1000
    """Steps before the temporal term comes in and the boost starts to fall (TSAE equation 4)."""
    ramp_steps: int = 1000
    """Steps over which the temporal term rises to its full weight and the boost falls (TSAE equation 4)."""
    buffer_std: float = 0.1
    """Standard deviation of the normal draws that start the temporal buffer (TSAE section 4.3)."""
    buffer_mixing: float = 0.25
    """Share of the new variance mixed into the temporal buffer until the warm-up of hold + ramp steps ends;
    1 afterwards (TSAE section 4.3)."""
    aux_weight: float = 1 / 32
    """Weight of the AuxK term that revives dead features (Gao et al. 2024); 0 switches it off."""
    aux_k: int = 0
    """Dead features used per token in the AuxK term; 0 takes half the input width."""
    dead_after_tokens: int = 10_000_000
    """A feature that has not fired for this many tokens counts as dead."""

    @property
    def terms(self) -> tuple[str, ...]:
        """The temporal terms asked for, in the order of `TEMPORAL` however they were written; empty for `none`."""
        names = self.temporal.split("+")
        return tuple(name for name in TEMPORAL if name in names)

    def check(self) -> None:
        """Raise `UserError` for a value that makes no sense."""
        if self.temporal != "none" and sorted(self.temporal.split("+")) != sorted(self.terms):
            raise UserError(
                f"objective.temporal is {self.temporal!r}; it must be none, or any of {', '.join(TEMPORAL)} joined by "
                "+, each once."
            )
        if "multiscale" in self.terms:
            previous = 0
            for low, high in self.bands:
                if not previous < low <= high:
                    raise UserError(
                        f"objective.bands is {self.bands}; bands must be ascending, disjoint ranges of offsets "
                        "from 1 on, such as ((1, 3), (4, 15), (16, 127))."
                    )
                previous = high
            if not self.bands or len(self.bands) != len(self.weights):
                raise UserError(
                    f"objective.weights has {len(self.weights)} values for {len(self.bands)} bands; give one "
                    "weight for each band."
                )
            if min(self.weights) < 0:
                raise UserError(f"objective.weights is {self.weights}; no weight must be negative.")
        if not 2 <= self.window <= LENGTH:
            raise UserError(
                f"objective.window is {self.window}; a window needs at least 2 tokens, and a sequence has {LENGTH}."
            )
        if not 1 <= self.offset < LENGTH:
            raise UserError(f"objective.offset is {self.offset}; it must be from 1 to {LENGTH - 1}.")
        if self.pairs == 1:
            raise UserError("objective.pairs is 1; a contrast needs at least 2 pairs, and 0 takes all.")
        for name in ("boost", "temperature"):
            if not getattr(self, name) > 0:
                raise UserError(f"objective.{name} is {getattr(self, name)}; it must be positive.")
        for name in (
            *("l1", "l0", "weight", "window_weight", "contrastive_weight", "slow_weight", "aux_weight"),
            *("min_variance", "buffer_std", "hold_steps", "ramp_steps", "aux_k", "dead_after_tokens", "group", "pairs"),
        ):
            if getattr(self, name) < 0:
                raise UserError(f"objective.{name} is {getattr(self, name)}; it must not be negative.")
        if not 0.0 <= self.buffer_mixing <= 1.0:
            raise UserError(f"objective.buffer_mixing is {self.buffer_mixing}; it must be from 0 to 1.")


@dataclass
class OptimizerConfig:
    """Optimizer, learning-rate schedule, and what is done to gradients."""

    name: Literal["adam", "adamw"] = "adam"
    """Adam, or AdamW with decoupled weight decay."""
    lr: float = 3e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's moment decays."""
    weight_decay: float = 0.01
    """adamw: decoupled weight decay (PyTorch's default)."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0 to the peak."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After the warm-up: constant, cosine to 0, or constant and then linear to 0 over `decay_share`."""
    decay_share: float = 0.3
    """linear: share of all steps over which the rate falls to 0."""
    clip_norm: float = 2.0
    """Clip the gradient to this norm; 0 switches it off (TSAE section 4.2)."""
    noise_eta: float = 0.0
    """Gradient noise of variance eta / (1 + step)^0.55, relative to each parameter's gradient RMS (Neelakantan
    et al. 2015; TSAE section 4.2); 0 switches it off."""
    noise_steps: int = 2000
    """Steps after which the gradient noise ends."""

    def check(self) -> None:
        """Raise `UserError` for a value that makes no sense."""
        if not self.lr > 0:
            raise UserError(f"optimizer.lr is {self.lr}; it must be positive.")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise UserError(f"optimizer.betas is {self.betas}; both must be at least 0 and below 1.")
        for name in ("weight_decay", "warmup_steps", "clip_norm", "noise_eta", "noise_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}; it must not be negative.")
        if not 0.0 <= self.decay_share <= 1.0:
            raise UserError(f"optimizer.decay_share is {self.decay_share}; it must be from 0 to 1.")


@dataclass
class BufferConfig:
    """The activation buffer between the language model and the autoencoder."""

    sequences: int = 2048
    """Sequences held; the buffer mixes sequences and never tokens."""
    reuse: int = 1
    """Times each sequence is trained on before it is replaced."""
    harvest_batch: int = 16
    """Sequences per forward pass of the language model."""
    estimate_sequences: int = 128
    """Sequences, the first of the run, from which the input's mean and scale are estimated."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Storage type of activations; `auto` is the language model's."""
    ahead: int = -1
    """Sequences that a thread harvests ahead while the autoencoder trains, at most; 0: none; -1: half the buffer where
    the language model is on a GPU, else none."""

    def prefetched(self, wanted: int, *, gpu: bool) -> int:
        """Sequences that are harvested ahead, of ``wanted`` in all; ``gpu``: that is where the language model is."""
        half = max(self.sequences // 2, self.harvest_batch)
        asked = self.ahead if self.ahead >= 0 else (half if gpu else 0)
        return min(asked, wanted)

    def check(self, batch: int) -> None:
        """Raise `UserError` for a value that makes no sense."""
        if self.ahead != -1 and 0 != self.ahead < self.harvest_batch:
            raise UserError(
                f"buffer.ahead is {self.ahead}; it must be -1, 0, or hold at least one forward pass of "
                f"{self.harvest_batch} sequences (buffer.harvest_batch)."
            )
        for name in ("sequences", "reuse", "harvest_batch", "estimate_sequences"):
            if getattr(self, name) < 1:
                raise UserError(f"buffer.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.sequences < batch:
            raise UserError(
                f"buffer.sequences is {self.sequences}; it must hold at least one batch of {batch} sequences."
            )


@dataclass
class EvaluationConfig:
    """What is measured after training, on text that training never saw."""

    sequences: int = 192
    """Sequences for reconstruction, sparsity and temporal metrics."""
    ce_sequences: int = 16
    """Sequences, of those, for the cross-entropy and KL metrics."""
    lm_batch: int = 4
    """Sequences per forward pass of the whole language model."""
    final: bool = True
    """Evaluate at the end of training."""

    def check(self) -> None:
        """Raise `UserError` for a value that makes no sense."""
        for name in ("sequences", "ce_sequences", "lm_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"evaluation.{name} is {getattr(self, name)}; it must be at least 1.")


@dataclass
class CheckpointConfig:
    """Checkpoints: atomic, the newest `keep` are kept."""

    every: int = 500
    """Steps between checkpoints; 0 saves at the end only."""
    keep: int = 2
    """Checkpoints kept."""

    def check(self) -> None:
        """Raise `UserError` for a value that makes no sense."""
        if self.every < 0:
            raise UserError(f"checkpoint.every is {self.every}; it must not be negative.")
        if self.keep < 1:
            raise UserError(f"checkpoint.keep is {self.keep}; at least 1 checkpoint must be kept.")


@dataclass
class ParallelConfig:
    """Several processes, as torchrun starts them; a run on any number of them is the run of one."""

    features: int = 1
    """Processes that each dictionary is split over; the processes divided by it are so many shares of the batch."""
    timeout: int = 600
    """Seconds that a process waits for the others before it gives up."""

    def check(self, sae: SAEConfig) -> None:
        """Raise `UserError` for a value that makes no sense."""
        for name in ("features", "timeout"):
            if getattr(self, name) < 1:
                raise UserError(f"parallel.{name} is {getattr(self, name)}; it must be at least 1.")
        if sae.d_sae % self.features:
            raise UserError(f"parallel.features is {self.features}; it must divide sae.d_sae, which is {sae.d_sae}.")
        if self.features > 1 and sae.layer_norm != "none":
            raise UserError(
                f"parallel.features is {self.features} with sae.layer_norm {sae.layer_norm!r}, which looks at all "
                "features of a token at once; use 1, or sae.layer_norm 'none'."
            )


@dataclass
class TrainConfig:
    """Train a temporal sparse autoencoder on a language model's activations."""

    preset: str = "demo"
    """Name of the preset this configuration started from."""
    model: str = "gemma-3-270m"
    """Language model: a hub id, a local folder, or `gemma-3-270m` for the packaged demo model."""
    revision: str | None = None
    """Revision of the model on the hub."""
    layer: int = 9
    """Block whose output is encoded, counted from 0."""
    data: str = "python-docs"
    """Text: `python-docs`, a .txt, .jsonl or .parquet file, a folder of them, or a hub data set id."""
    steps: int = 1000
    """Optimizer steps."""
    batch: int = 16
    """Sequences of 128 tokens per step."""
    chunk: int = 0
    """Sequences worked on at once, for dictionaries whose features of a whole batch do not fit in memory; 0: all. The
    gradients of a step's pieces are added up. What depends on the batch as a whole is then each piece's own: the
    thresholds of batchtopk and of exact steering, the contrastive objective's negatives, the variance of slow, the
    scale of AuxK; the temporal buffer moves after the step."""
    seed: int = 0
    """Seed of everything random: text order, weights, batches, noise."""
    data_seed: int | None = None
    """Seed of the text's order and split and of the batches' order; None takes `seed`. Runs with one data seed
    see the same batches, whatever their weights start from."""
    device: str = "auto"
    """Where to compute: `auto`, `cpu`, `cuda`, `cuda:1`, ..."""
    lm_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the language model; `auto` is bfloat16 where the hardware is faster so."""
    autocast: Literal["auto", "none", "bfloat16"] = "auto"
    """Precision of the autoencoder's matrix products; its weights stay float32."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where else the measurements go: `tensorboard`, `wandb`, or both; to metrics.jsonl in any case."""
    cache: str | None = None
    """Directory that keeps harvested activations: what it has is read instead of harvested, what it lacks is added
    (docs/cache.md)."""
    normalize: bool = True
    """Centre and scale the activations, as estimated on the first sequences; off, the autoencoder is trained on raw
    ones."""
    sae: SAEConfig = field(default_factory=SAEConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    buffer: BufferConfig = field(default_factory=BufferConfig)
    text: TextConfig = field(default_factory=TextConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def stream_seed(self) -> int:
        """The seed of everything that the activations and their order depend on."""
        return self.seed if self.data_seed is None else self.data_seed

    def check(self) -> None:
        """Raise `UserError`, one sentence, for the first value that makes no sense."""
        _check_finite(dataclasses.asdict(self))
        for name in ("steps", "batch", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name, seed in (("seed", self.seed), ("data_seed", self.stream_seed)):
            if not 0 <= seed < 2**63:
                raise UserError(f"{name} is {seed}; it must be from 0 to 2^63 - 1.")
        self.sae.check()
        self.objective.check()
        if self.objective.group > self.sae.d_sae:
            raise UserError(
                f"objective.group is {self.objective.group}; the autoencoder has {self.sae.d_sae} features."
            )
        if self.objective.l0 > 0 and not self.sae.kind.learned:
            raise UserError(
                f"objective.l0 is {self.objective.l0}; sae.activation '{self.sae.activation}' has no learned threshold "
                "for it to move."
            )
        self.optimizer.check()
        if self.chunk < 0:
            raise UserError(f"chunk is {self.chunk}; it must be a number of sequences, or 0 for the whole batch.")
        self.buffer.check(self.batch)
        self.evaluation.check()
        self.checkpoint.check()
        self.parallel.check(self.sae)


def _check_finite(value: Any, where: str = "") -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_finite(inner, f"{where}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _check_finite(inner, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} is {value}; it must be a finite number.")
