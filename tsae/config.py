"""The configuration of a run: nested dataclasses that Python reads and the command line overrides.

A field's docstring is its text in ``--help``; its annotation declares the range of its values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from tsae.errors import UserError
from tsae.lm.placement import DeviceMap, Quantization
from tsae.lm.site import Site, from_option
from tsae.sae.kinds import KINDS, Activation, Kind
from tsae.utils.ranges import Range, at_least, between, check_ranges, positive
from tsae_kernels import MULTISCALE

MAX_LENGTH = 4096  # content tokens per sequence, at most

TEMPORAL = ("multiscale", "window", "contrastive", "slow")  # terms that objective.temporal may sum
OWN_TERM = "python:"  # before the name of a function of the user's, see tsae.training.own_terms

PositiveInt = Annotated[int, at_least(1)]
NonNegativeInt = Annotated[int, at_least(0)]
PositiveFloat = Annotated[float, positive]
NonNegativeFloat = Annotated[float, at_least(0)]
Fraction = Annotated[float, between(0, 1)]
seed_range = between(0, 2**63 - 1)


@dataclass
class SAEConfig:
    """Architecture of a sparse autoencoder."""

    d_in: NonNegativeInt = 0
    """Width of the activations; 0: that of the language model."""
    d_out: NonNegativeInt = 0
    """Width of the activations that a transcoder predicts; 0: an autoencoder, which reconstructs its input, or with a
    target the width of that."""
    d_sae: PositiveInt = 2560
    """Number of features."""
    activation: Activation = "schmitt"
    """Nonlinearity of the encoder. `schmitt` (hysteresis) switches a feature on above one threshold and off below a
    lower one, along the sequence; `rate` does so with both thresholds per feature, from how often it switches;
    `jumprelu` learns a threshold per feature, `jumprelu_schmitt` both thresholds; `persistent` is a leaky recurrence of
    batchtopk's features along the sequence, with a decay learned per feature."""
    k: int = 32
    """Active features per token: exact (topk), mean (batchtopk; persistent, before its recurrence), or the target of
    the mean L0 (schmitt, rate; jumprelu and jumprelu_schmitt if objective.l0 is 0)."""
    support_bits: NonNegativeFloat = 0.0
    """rate: target of the support's bits per token, instead of sae.k of the mean L0; 0: sae.k."""
    amplitude_bits: NonNegativeFloat = 4.0
    """rate: price in bits of an active value, beside what its switching costs."""
    release_ratio: Fraction = 0.3
    """schmitt: switch-off threshold divided by switch-on threshold, 0 to 1; 1 is no hysteresis. jumprelu_schmitt: its
    initial value. rate: its initial value, and what the ratio of a feature approaches the rarer it is."""
    hysteresis: Literal["causal", "two-sided", "path"] = "causal"
    """schmitt, rate: `causal` keeps a feature on after it switches on; `two-sided` also extends it backwards, which
    costs two more passes. rate: `path` takes each feature's path of least error and bits over the whole sequence. Both
    use future tokens."""
    steering: Literal["controller", "exact"] = "controller"
    """schmitt: how the threshold reaches a mean L0 of sae.k. `controller` moves it a little each step; `exact` solves
    for it in every batch, hysteresis included, and keeps a running mean for inference, as batchtopk does."""
    gate_gradient: NonNegativeFloat = 0.0
    """schmitt, rate: strength of a pseudo-gradient of being on, which reaches the encoder from entries
    within sae.bandwidth of a threshold (docs/mathematics.md, section 9); 0: none, 1: as for jumprelu's thresholds."""
    initial_decay: Annotated[float, Range("above 0 and below 0.999", lambda decay: 0 < decay < 0.999)] = 0.5
    """persistent: initial decay l of every feature, above 0 and below 0.999, in h_t = l h_{t-1} + (1 - l) a_t."""
    bandwidth: PositiveFloat = 0.5
    """jumprelu, jumprelu_schmitt, and with sae.gate_gradient: width of the straight-through window around a threshold,
    as a fraction of the threshold (Rajamanoharan et al. 2024, section 3)."""
    groups: tuple[int, ...] = ()
    """Matryoshka: ascending prefix sizes, the last equal to sae.d_sae; each prefix of the features must reconstruct
    on its own (Bussmann et al. 2025). Empty: off."""
    layer_norm: Literal["none", "pre", "post"] = "none"
    """Layer normalization of the features, before or after the nonlinearity (TSAE section 4.3)."""
    init: Literal["tied", "xavier"] = "tied"
    """Initial weights: `tied` draws unit-norm decoder rows and transposes them into the encoder; `xavier` is
    Xavier uniform for both (TC-SAE section 4)."""
    encoder_scale: PositiveFloat = 1.0
    """tied: the encoder starts as the transposed decoder times this. Below 1, the first reconstructions do not
    overshoot and features become more persistent."""
    unit_norm_decoder: bool = True
    """Keep decoder rows at norm 1 and remove the gradient's component along them (TC-SAE section 4)."""
    apply_b_dec_to_input: bool = True
    """Subtract `b_dec` from the input before the encoder; off with a target, to which `b_dec` belongs."""
    input_scale: PositiveFloat = 1.0
    """Divide the input and multiply the output by this. Set when trained weights are folded and the activation is not
    homogeneous (gelu, layer normalization); otherwise 1."""

    @property
    def width_out(self) -> int:
        """Width of what the decoder puts out."""
        return self.d_out or self.d_in

    @property
    def kind(self) -> Kind:
        """The properties of ``activation``."""
        return KINDS[self.activation]

    @property
    def uses_gate_gradient(self) -> bool:
        """Whether the activation has the pseudo-gradient of ``gate_gradient``."""
        return self.gate_gradient > 0 and self.kind.steered

    def check(self) -> None:
        """Raise `UserError` for the first invalid value."""
        check_ranges(self, "sae.")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.activation not in KINDS:
            raise UserError(f"sae.activation is {self.activation!r}; use {', '.join(KINDS)}.")
        if self.d_out and self.apply_b_dec_to_input:
            raise UserError(
                f"sae.d_out is {self.d_out}, of a transcoder, with sae.apply_b_dec_to_input, which would subtract the "
                "target's bias from the input; turn it off."
            )
        if self.kind.k_sparse and not 1 <= self.k <= self.d_sae:
            raise UserError(f"sae.k is {self.k}; it must be from 1 to sae.d_sae, which is {self.d_sae}.")
        if self.groups and (
            list(self.groups) != sorted(set(self.groups)) or self.groups[0] < 1 or self.groups[-1] != self.d_sae
        ):
            raise UserError(
                f"sae.groups is {self.groups}; it must be ascending numbers of features, the last of them sae.d_sae, "
                f"which is {self.d_sae}."
            )
        if (self.kind.steered or self.kind.learned or self.kind.recurrent) and self.layer_norm == "post":
            raise UserError(
                f"sae.layer_norm is 'post' with sae.activation '{self.activation}'; use 'pre' or 'none', because "
                "normalizing after the threshold would undo its zeros."
            )
        self._check_steered()

    def _check_steered(self) -> None:
        kind = self.kind
        needed = ("causal", "controller", "none")
        if self.uses_gate_gradient and (self.hysteresis, self.steering, self.layer_norm) != needed:
            raise UserError(
                f"sae.gate_gradient is {self.gate_gradient:g} with sae.hysteresis {self.hysteresis!r}, sae.steering "
                f"{self.steering!r} and sae.layer_norm {self.layer_norm!r}; set it to 0, or these to 'causal', "
                "'controller' and 'none'."
            )
        if kind.rates and (not self.unit_norm_decoder or self.layer_norm != "none"):
            raise UserError(
                f"sae.activation is {self.activation!r}, whose thresholds are those of features with decoder rows of "
                "norm 1; use sae.unit_norm_decoder and no sae.layer_norm."
            )
        for name, default, allowed in (
            ("hysteresis", "causal", kind.steered and (kind.rates or self.hysteresis != "path")),
            ("steering", "controller", kind.steered and not kind.rates),
            ("support_bits", 0.0, kind.rates),
        ):
            value = getattr(self, name)
            if value != default and not allowed:
                only = "rate" if name == "support_bits" or value == "path" else "schmitt"
                also = " and 'rate' have" if name == "hysteresis" and value == "two-sided" else " has"
                raise UserError(
                    f"sae.{name} is {value!r} with sae.activation {self.activation!r}; only {only!r}{also} the choice."
                )


@dataclass
class ObjectiveConfig:
    """The loss: reconstruction, sparsity, temporal consistency, revival of dead features."""

    temporal: Annotated[
        str, tyro.conf.arg(aliases=["--objective"], metavar="{none," + ",".join(TEMPORAL) + "}[+...]")
    ] = "multiscale"
    """Temporal term: `multiscale` (TSAE equation 2), `window` (TC-SAE equation 3), `contrastive` (T-SAE's InfoNCE),
    `slow` (one minus each feature's autocorrelation), `none`, or a sum such as `contrastive+window`."""
    weight: NonNegativeFloat = 1.0
    """Factor on the complete temporal term."""
    group: NonNegativeInt = 0
    """Apply the temporal term to the first `group` features only; 0: all."""
    bands: tuple[tuple[int, int], ...] = MULTISCALE
    """multiscale: inclusive ranges of token offsets, one per scale (TSAE section 4.1)."""
    weights: tuple[float, ...] = (0.01, 0.005, 0.001)
    """multiscale: weight of each band (TSAE section 5.2)."""
    adaptive: bool = True
    """multiscale: weight features by their activation variance (TSAE equation 3)."""
    min_variance: NonNegativeFloat = 0.01
    """multiscale: skip features whose variance is below this (TSAE section 4.1)."""
    window: Annotated[int, between(2, MAX_LENGTH)] = 3
    """window: tokens in the sliding window, at least 2 (TC-SAE section 4)."""
    window_weight: NonNegativeFloat = 0.01
    """window: weight of the term (TC-SAE equation 4, lambda_2)."""
    contrastive_weight: NonNegativeFloat = 1.0
    """contrastive: weight of the term."""
    slow_weight: NonNegativeFloat = 1.0
    """slow: weight of the term."""
    offset: Annotated[int, between(1, MAX_LENGTH - 1)] = 1
    """contrastive: maximum distance in tokens within a pair, drawn uniformly from 1 to this; slow: largest
    offset of the differences."""
    temperature: PositiveFloat = 0.1
    """contrastive: divisor of the cosine similarities."""
    pairs: NonNegativeInt = 256
    """contrastive: pairs drawn from each batch; 0 takes one for every token that has a neighbour."""
    negatives: Literal["all", "other-sequences"] = "all"
    """contrastive: negatives of a pair: all other pairs of the batch, or only pairs from other sequences."""
    l1: NonNegativeFloat = 0.04
    """Weight of the L1 penalty on features (TSAE section 4.3; TC-SAE equation 4, lambda_1)."""
    l0: NonNegativeFloat = 0.0
    """jumprelu, jumprelu_schmitt: weight of the L0 penalty (Rajamanoharan et al. 2024, section 3); 0 instead scales
    all thresholds together so that the mean L0 is sae.k."""
    boost: PositiveFloat = 2.0
    """Factor on the reconstruction term until `hold_steps`; it then falls linearly to 1 over `ramp_steps`
    (TSAE equation 4)."""
    hold_steps: NonNegativeInt = 1000
    """Steps before the temporal term starts and the boost begins to fall (TSAE equation 4)."""
    ramp_steps: NonNegativeInt = 1000
    """Steps over which the temporal term rises to full weight and the boost falls to 1 (TSAE equation 4)."""
    buffer_std: NonNegativeFloat = 0.1
    """Standard deviation of the normal draws that initialize the temporal buffer (TSAE section 4.3)."""
    buffer_mixing: Fraction = 0.25
    """Fraction of the new variance mixed into the temporal buffer during the first hold + ramp steps; 1 afterwards
    (TSAE section 4.3)."""
    aux_weight: NonNegativeFloat = 1 / 32
    """Weight of the AuxK term that revives dead features (Gao et al. 2024); 0: off."""
    aux_k: NonNegativeInt = 0
    """Dead features used per token in the AuxK term; 0 takes half the input width."""
    dead_after_tokens: NonNegativeInt = 10_000_000
    """A feature is dead after this many tokens without firing."""

    @property
    def terms(self) -> tuple[str, ...]:
        """The temporal terms, in the order of `TEMPORAL`; empty for `none`."""
        names = self.temporal.split("+")
        return tuple(name for name in TEMPORAL if name in names)

    @property
    def own_terms(self) -> tuple[str, ...]:
        """The names of the user's functions among the temporal terms, `python:NAME`, in order."""
        parts = self.temporal.split("+")
        return tuple(part.removeprefix(OWN_TERM) for part in parts if part.startswith(OWN_TERM))

    def check(self) -> None:
        """Raise `UserError` for the first invalid value."""
        check_ranges(self, "objective.")
        self._check_combinations()

    def _check_combinations(self) -> None:
        named = [*self.terms, *{f"{OWN_TERM}{name}" for name in self.own_terms}]
        if self.temporal != "none" and sorted(self.temporal.split("+")) != sorted(named):
            raise UserError(
                f"objective.temporal is {self.temporal!r}; it must be none, or any of {', '.join(TEMPORAL)} joined by "
                "+, each once."
            )
        if self.pairs == 1:
            raise UserError("objective.pairs is 1; a contrast needs at least 2 pairs, and 0: all.")
        if "multiscale" not in self.terms:
            return
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
            raise UserError(f"objective.weights is {self.weights}; each must be at least 0.")


@dataclass
class OptimizerConfig:
    """Optimizer, learning-rate schedule, gradient clipping and noise."""

    name: Literal["adam", "adamw"] = "adam"
    """Adam, or AdamW with decoupled weight decay."""
    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    betas: Annotated[tuple[float, float], Range("at least 0 and below 1", lambda beta: 0 <= beta < 1)] = (0.9, 0.999)
    """Adam's moment decays."""
    weight_decay: NonNegativeFloat = 0.01
    """adamw: decoupled weight decay (PyTorch's default)."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0 to the peak."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After the warm-up: constant, cosine to 0, or constant and then linear to 0 over `decay_share`."""
    decay_share: Fraction = 0.3
    """linear: fraction of all steps over which the rate falls to 0."""
    clip_norm: NonNegativeFloat = 2.0
    """Maximum gradient norm; 0: no clipping (TSAE section 4.2)."""
    noise_eta: NonNegativeFloat = 0.0
    """Gradient noise of variance eta / (1 + step)^0.55, relative to each parameter's gradient RMS (Neelakantan
    et al. 2015; TSAE section 4.2); 0: off."""
    noise_steps: NonNegativeInt = 2000
    """Steps after which the gradient noise ends."""


@dataclass
class BufferConfig:
    """The activation buffer between the language model and the autoencoder."""

    sequences: PositiveInt = 2048
    """Sequences held; the buffer shuffles sequences and never splits them."""
    reuse: PositiveInt = 1
    """Times each sequence is trained on before it is replaced."""
    harvest_batch: PositiveInt = 16
    """Sequences per forward pass of the language model."""
    estimate_sequences: PositiveInt = 128
    """Sequences at the start of the run from which the input's mean and scale are estimated."""
    max_norm_ratio: Annotated[float, Range("0 or at least 1", lambda ratio: ratio == 0 or ratio >= 1)] = 0.0
    """Leave tokens out of training whose activation norm is above this multiple of the median norm of the first
    `estimate_sequences` sequences (docs/metrics.md, "Massive activations"); 0 leaves none out."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Storage dtype of activations; `auto` is the language model's."""
    ahead: int = -1
    """Most sequences that a thread prefetches while the autoencoder trains; 0: none; -1: half the buffer if the
    language model is on a GPU, otherwise none."""

    def prefetched(self, wanted: int, *, gpu: bool) -> int:
        """Sequences to prefetch at most.

        wanted: sequences that the run harvests in all
        gpu: whether the language model is on a GPU
        """
        half = max(self.sequences // 2, self.harvest_batch)
        asked = self.ahead if self.ahead >= 0 else (half if gpu else 0)
        return min(asked, wanted)


@dataclass(frozen=True)
class TextConfig:
    """How to read a text source."""

    column: str | None = None
    """Column of jsonl, csv, parquet, saved and hub data; `a.b` is b in the object a. Default: `text`; or the chats in
    `messages` or `conversations`; or the only column of strings if it holds prose."""
    split: str = "train"
    """Split of a hub dataset or of one saved by `save_to_disk`; training and evaluation text are both taken from it."""
    subset: str | None = None
    """Subset (configuration) of a hub dataset."""
    evaluation_share: Fraction = 0.05
    """Fraction of the documents held out for evaluation, 0 to 1."""
    threshold: Annotated[float | None, tyro.conf.Suppress] = None
    """Documents whose hash, in [0, 1), is below this are evaluation text. Set by a run, so that its split stays the
    same when its text changes and also applies to other text. None: `evaluation_share`, adjusted if there are so few
    documents that one side would be empty."""
    shuffle_buffer: PositiveInt = 10_000
    """Documents in the shuffle buffer."""
    roles: tuple[str, ...] = ()
    """Of chats count only what these roles say, such as `assistant`: the other messages and the template are read by
    the language model but are in no statistic and not trained on. None given: everything but special tokens counts."""
    min_characters: NonNegativeInt = 0
    """Leave out documents with fewer characters; of a chat those of the messages count."""
    max_characters: Annotated[int, Range("0 or at least 2", lambda value: value == 0 or value >= 2)] = 0
    """Cut documents at a boundary within this many characters and leave out the rest; a chat ends after the last
    complete message within them. 0: no limit."""
    prepend_bos: Literal["auto", "yes", "no"] = "auto"
    """Start every sequence with BOS, or with EOS if the tokenizer has no BOS: `auto` does unless the model's
    tokenizer_config.json says `add_bos_token: false` and BOS is not EOS. The activation at a sequence's first position,
    whichever token stands there, is never used. A run records `yes` or `no`."""


@dataclass
class EvaluationConfig:
    """Evaluation after training, on held-out text."""

    sequences: PositiveInt = 192
    """Sequences for reconstruction, sparsity and temporal metrics."""
    ce_sequences: PositiveInt = 16
    """How many of these sequences also give cross-entropy and KL metrics."""
    lm_batch: PositiveInt = 4
    """Sequences per forward pass through all layers of the language model."""
    massive_ratio: Annotated[float, at_least(1)] = 4.0
    """Tokens whose activation norm is above this multiple of the median norm are massive: the start of training and
    eval.json say how much of the squared norm they hold, and eval.json gives the explained variance without them."""
    final: bool = True
    """Evaluate at the end of training."""


@dataclass
class CheckpointConfig:
    """Checkpoints, written atomically."""

    every: NonNegativeInt = 500
    """Steps between checkpoints; 0 saves at the end only."""
    keep: PositiveInt = 2
    """Number of newest checkpoints to keep."""


@dataclass
class ParallelConfig:
    """Several processes, started by torchrun. Results are the same for any number, up to rounding."""

    features: PositiveInt = 1
    """Processes that share each dictionary, each with a slice of its features; the rest is data-parallel: N processes
    split the batch into N / `features` shards."""
    timeout: PositiveInt = 600
    """Seconds a process waits for the others before it gives up."""


@dataclass
class TrainConfig:
    """Train a temporal sparse autoencoder on a language model's activations."""

    preset: str = "demo"
    """Name of the preset this configuration started from."""
    model: str = "gemma-3-270m"
    """Language model: a hub id, a local folder, or a demo model, `gemma-3-270m` or `smollm2-135m-instruct`, from its
    Python package."""
    revision: str | None = None
    """Revision of the model on the hub."""
    layer: int = 9
    """Block that is encoded, counted from 0."""
    site: str = "resid_post"
    """Which of the block's activations are encoded: `resid_post` (its output), `resid_pre` (its input), `resid_mid`,
    `attn_out`, `mlp_out`, `mlp_in`, or the path of a module in it, such as `model.layers.9.mlp.down_proj` (its output)
    or `model.layers.9.mlp.down_proj.input`. docs/howto/hook-points.md says what each is."""
    target: str | None = None
    """A transcoder: predict these activations, of the same block, from those at `site`: a name as for `site`, of the
    same or a later place. A path or SAELens's name may name a later block. None: an autoencoder."""
    data: str = "python-docs"
    """Text: `python-docs`, a .txt, .jsonl, .csv or .parquet file, a folder of them or one saved by `save_to_disk`, a
    hub dataset id, or several with their shares: `pile:0.7,code/:0.3`, or a .yaml file (docs/howto/own-text.md)."""
    steps: PositiveInt = 1000
    """Optimizer steps."""
    length: Annotated[int, between(2, MAX_LENGTH)] = 128
    """Content tokens per sequence, 2 to 4096: the window along which features are compared. The language model sees
    one more, the first, whose activation is dropped. With another length than the preset's, options that count
    sequences and are not given keep the preset's number of tokens (docs/howto/length.md)."""
    batch: PositiveInt = 16
    """Sequences per step, each of `length` tokens."""
    chunk: NonNegativeInt = 0
    """Sequences per forward and backward pass, with gradients accumulated over the batch, if the features of a full
    batch do not fit in memory; 0: all. Anything computed over the batch is then computed per chunk: the thresholds
    of batchtopk and of exact steering, the negatives of contrastive, the variance of slow, the scale of AuxK. The
    temporal buffer is updated once per step."""
    seed: Annotated[int, seed_range] = 0
    """Random seed: text order, weights, batches, noise."""
    data_seed: Annotated[int | None, seed_range] = None
    """Seed of text order and batch order; None: the same as `seed`. Runs with the same data seed see the same
    batches, whatever their initial weights."""
    device: str = "auto"
    """Device: `auto`, `cpu`, `cuda`, `cuda:1`, ..."""
    lm_device: str = "auto"
    """Device of the language model; `auto`: the same. On a GPU of its own, a thread prefetches activations there while
    the autoencoder trains (`buffer.ahead`). In one process."""
    lm_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the language model; `auto` is bfloat16 on hardware where it is faster, otherwise float32."""
    lm_device_map: DeviceMap = "none"
    """Divide the language model among all GPUs, and the CPU's memory if they are too small, as accelerate's device_map
    does. The autoencoder stays on `device`. In one process."""
    lm_quantization: Quantization = "none"
    """Quantize the language model's linear layers with bitsandbytes: `8bit` (LLM.int8, products in float16) or `4bit`
    (NF4). A model whose config.json has a quantization_config is loaded as that says, with `none`."""
    trust_remote_code: bool = False
    """Run the code that comes with a model which transformers has no class for. Read it first."""
    autocast: Literal["auto", "none", "bfloat16"] = "auto"
    """Precision of the autoencoder's matrix products; its weights stay float32."""
    sparse_step: Literal["auto", "on", "off"] = "auto"
    """Steps on lists of the active features, with one dense product (the encoder's) and an optimizer that reads the
    gradient of features that fired: `auto` on a GPU with Triton. For topk, batchtopk, schmitt and rate (causal
    hysteresis), without layer normalization, in one process; anything else has dense products on a GPU. On a CPU `off`
    is faster."""
    cuda_graph: bool = False
    """Capture the training step in a CUDA graph, which spares the host the launches (docs/scale.md)."""
    log_every: PositiveInt = 10
    """Steps between lines of metrics.jsonl."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Trackers that get the metrics in addition to metrics.jsonl: `tensorboard`, `wandb`, or both."""
    cache: str | None = None
    """Directory of cached activations: cached ones are read, missing ones are harvested and added
    (docs/cache.md)."""
    normalize: bool = True
    """Centre and scale the activations, with mean and scale estimated on the first sequences; off trains on raw
    activations."""
    init_from: str | None = None
    """Start from the weights of this autoencoder: a run, another directory in a known format, or OWNER/NAME/FOLDER on
    the hub. Options of `sae` that are not given are taken from it (docs/howto/fine-tune.md)."""
    sae: SAEConfig = field(default_factory=SAEConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    buffer: BufferConfig = field(default_factory=BufferConfig)
    text: TextConfig = field(default_factory=TextConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def place(self) -> Site:
        """The place of the activations.

        Raises `UserError` if `site` names none, or one of another block than `layer`.
        """
        return from_option(self.site, self.layer)

    @property
    def target_place(self) -> Site | None:
        """The place of the activations that a transcoder predicts; None for an autoencoder.

        Raises `UserError` if `target` names none.
        """
        return None if self.target is None else from_option(self.target, self.layer, any_layer=True)

    @property
    def described(self) -> str:
        """The place in words, with the target of a transcoder."""
        target = self.target_place
        return self.place.described if target is None else f"{self.place.described}, to {target.described}"

    @property
    def lm_options(self) -> dict[str, Any]:
        """What `tsae.lm.loading.load_language_model` takes beside the model's name and device."""
        return {
            "dtype": self.lm_dtype,
            "revision": self.revision,
            "device_map": self.lm_device_map,
            "quantization": self.lm_quantization,
            "trust_remote_code": self.trust_remote_code,
        }

    @property
    def stream_seed(self) -> int:
        """Seed of the activations and their order."""
        return self.seed if self.data_seed is None else self.data_seed

    def _check_places(self) -> None:
        place, target = self.place, self.target_place
        if target is None:
            if self.sae.d_out:
                raise UserError(f"sae.d_out is {self.sae.d_out}, but there is no target; name one with --target.")
            return
        if target.key == place.key:
            raise UserError(f"target and site are both {place.hook_name}; leave the target out for an autoencoder.")
        if target.number < place.number:
            raise UserError(f"the target {target.hook_name} comes before the site {place.hook_name}; exchange them.")
        if self.buffer.max_norm_ratio:
            raise UserError(
                f"buffer.max_norm_ratio is {self.buffer.max_norm_ratio} with a target; a token then has two norms, so "
                "leave it out."
            )
        if self.parallel.features > 1:
            raise UserError(
                f"parallel.features is {self.parallel.features} with a target; transcoders are trained in one process."
            )

    def check(self) -> None:
        """Raise `UserError`, one sentence, for the first invalid value."""
        check_ranges(self)
        self._check_places()
        sae, objective, buffer, parallel = self.sae, self.objective, self.buffer, self.parallel
        sae._check_combinations()
        objective._check_combinations()
        if objective.group > sae.d_sae:
            raise UserError(f"objective.group is {objective.group}; the autoencoder has {sae.d_sae} features.")
        if objective.l0 > 0 and not sae.kind.learned:
            raise UserError(
                f"objective.l0 is {objective.l0}; sae.activation '{sae.activation}' has no learned threshold for it "
                "to move."
            )
        self._check_length()
        if buffer.ahead not in (-1, 0) and buffer.ahead < buffer.harvest_batch:
            raise UserError(
                f"buffer.ahead is {buffer.ahead}; it must be -1, 0, or at least one forward pass of "
                f"{buffer.harvest_batch} sequences (buffer.harvest_batch)."
            )
        if buffer.sequences < self.batch:
            raise UserError(
                f"buffer.sequences is {buffer.sequences}; it must hold at least one batch of {self.batch} sequences."
            )
        if sae.d_sae % parallel.features:
            raise UserError(
                f"parallel.features is {parallel.features}; it must divide sae.d_sae, which is {sae.d_sae}."
            )
        if parallel.features > 1 and sae.layer_norm != "none":
            raise UserError(
                f"parallel.features is {parallel.features} with sae.layer_norm {sae.layer_norm!r}, which needs all "
                "features of a token at once; use 1, or sae.layer_norm 'none'."
            )

    def _check_length(self) -> None:
        """Refuse a temporal term that reaches beyond a sequence, or that has nothing to contrast."""
        objective, terms = self.objective, self.objective.terms
        reach = [("window", objective.window, self.length)] if "window" in terms else []
        if "contrastive" in terms or "slow" in terms:
            reach.append(("offset", objective.offset, self.length - 1))
        for name, value, most in reach:
            if value > most:
                raise UserError(
                    f"objective.{name} is {value}; it must be at most {most}, because sequences have {self.length} "
                    "tokens (length)."
                )
        alone = min(self.batch, self.chunk or self.batch) == 1
        if alone and "contrastive" in terms and objective.negatives == "other-sequences":
            raise UserError(
                "objective.negatives is 'other-sequences' with one sequence at a time (batch, chunk), which leaves no "
                "negative; use more sequences, or objective.negatives all."
            )
