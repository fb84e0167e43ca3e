"""What an evaluation is asked for, measures and writes; `tsae.evaluate` is its command line and its function.

One run alone is evaluated again: its eval.json and report.png are rewritten. With `release_ratio` its autoencoder is
measured with another release ratio, at the same L0 on the run's training text (`tsae.sae.release`), with `length` on
sequences of another length; the run's own eval.json and report.png are then kept. Several autoencoders, of any library,
share one pass of the language model; nothing is written into their directories.

Opening: `tsae.evaluation.subject`. Text: `tsae.evaluation.held_out`. Measuring: `tsae.evaluation.evaluator`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from tsae.config import TrainConfig
from tsae.errors import UserError
from tsae.evaluation.evaluator import (
    EvaluationResult,
    evaluate_all,
    evaluation_options,
    evaluation_progress,
    write_eval,
)
from tsae.evaluation.held_out import HeldOut, choose_source, held_out, training_sample
from tsae.evaluation.places import check_one_model, common_length
from tsae.evaluation.subject import Subject, open_autoencoders, open_run
from tsae.integrations.sae_bench_output import core_output
from tsae.lm.placement import DeviceMap, Quantization
from tsae.presets import at_length
from tsae.reports.figure import write_report
from tsae.rundir import layout
from tsae.rundir.ownership import check_output
from tsae.sae.release import check_has_thresholds, with_hysteresis, with_release_ratio
from tsae.utils.atomic import write_json
from tsae.utils.cli import check_counts
from tsae.utils.paths import expanded


@dataclass
class Arguments:
    """Evaluate a trained run again: rewrite its eval.json and report.png and print the metrics.

    With --release-ratio R, write eval-release-R.json instead; with another --length N, eval-length-N.json.

    With --model, and --layer where their files do not say it, evaluate autoencoders of other libraries; several are
    printed side by side. Nothing is rewritten.
    """

    saes: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN|SAE ...")]
    """A run directory; or autoencoders in any known format, as directories or as OWNER/NAME/FOLDER on the hub."""
    model: str | None = None
    """Language model that the autoencoders encode, as for training. Default: from the runs among them."""
    layer: int | None = None
    """Block that they encode, counted from 0. Default: what the autoencoders or their runs say."""
    site: str | None = None
    """Which of the block's activations they encode, as for training. Default: what the autoencoders or their runs say,
    or else the block's output."""
    format: Literal["tsae", "saebench"] = "tsae"
    """`saebench` also writes SAEBench's core output: to saebench_core.json in the run, or to --out."""
    out: Path | None = None
    """Write the metrics to this JSON file; with several autoencoders, by name."""
    data: str | None = None
    """Text to evaluate on. Documents that the run trained on are left out: only the evaluation side of the run's
    split is used, or, if that is too short, everything that is not in the run's training text. Default: the
    evaluation part of the run's own text."""
    tokens: int | None = None
    """Tokens for the reconstruction, sparsity and temporal metrics. Default: as in the run's configuration."""
    ce_sequences: int | None = None
    """Sequences for the cross-entropy and KL metrics. Default: as in the run's configuration."""
    massive_ratio: float | None = None
    """Tokens whose activation norm is above this multiple of the median norm count as massive (at least 1). Default: as
    in the run's configuration, or 4."""
    seed: int | None = None
    """Seed of the text order and of the shuffled control. Default: the run's."""
    device: str | None = None
    """Device: `auto`, `cpu`, `cuda`, ... Default: the run's."""
    revision: str | None = None
    """Revision of the model on the hub, which --model names. Default: the hub's newest."""
    lm_dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Precision of the language model, which --model names. Default: as the runs were trained, or `auto`."""
    lm_device_map: DeviceMap | None = None
    """Divide the language model among all GPUs, as accelerate does. Default: the run's, without --device."""
    lm_quantization: Quantization | None = None
    """Quantize the language model, which --model names, with bitsandbytes. Default: as the runs were trained."""
    trust_remote_code: bool = False
    """Run the code that comes with a model which transformers has no class for. Read it first. A run that was trained
    with it needs no option."""
    column: str | None = None
    """Column of the data set that holds the text. Default: the run's."""
    release_ratio: float | None = None
    """Measure the run's autoencoder with this release ratio, 0 to 1 (1: no hysteresis), at the same L0: all thresholds
    are multiplied by one factor, fitted on the run's training text, on as many sequences as the evaluation uses. The
    metrics go to eval-release-R.json. Default: as trained."""
    hysteresis: Literal["causal", "two-sided", "path"] | None = None
    """Measure the run's autoencoder with another kind of hysteresis (sae.hysteresis) and the same thresholds; `path` is
    for the activation `rate`. The metrics go to eval-hysteresis-KIND.json. Default: as trained."""
    length: int | None = None
    """Tokens per sequence, 2 to 4096, of the same held-out documents. With another length than the run's the metrics go
    to eval-length-N.json. Default: the runs' length, or 128."""

    @property
    def rewrites(self) -> bool:
        """Whether one run is to be evaluated again."""
        return len(self.saes) == 1 and (self.model, self.layer, self.site) == (None, None, None)

    def lm_options(self, config: TrainConfig) -> dict[str, Any]:
        """Fields of ``config`` about the language model that were asked for."""
        names = ("revision", "lm_dtype", "lm_device_map", "lm_quantization")
        asked = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return asked | {"trust_remote_code": config.trust_remote_code or self.trust_remote_code}

    @property
    def run(self) -> Path:
        """The first path, which is a run's if `rewrites`."""
        return expanded(self.saes[0])

    @property
    def writes_into(self) -> list[Path]:
        """The directories in which files are written."""
        return ([self.run] if self.rewrites else []) + ([] if self.out is None else [self.out.parent])


@dataclass
class Measured:
    """What was measured, with what result."""

    subject: Subject
    """With the sizes and the text that were measured in its configuration."""
    text: HeldOut
    results: dict[str, EvaluationResult]
    release: dict[str, float] | None = None
    """The release ratio, the factor on the thresholds, and the L0 it keeps; None for autoencoders as trained."""
    length: int | None = None
    """Tokens per sequence; None for those of the run."""
    hysteresis: str | None = None
    """Another kind of hysteresis; None for autoencoders as trained."""

    @property
    def tokens(self) -> int:
        """Tokens behind each result."""
        return next(iter(self.results.values())).tokens


def measure(arguments: Arguments) -> Measured:
    """Measure the autoencoders that ``arguments`` name. Writes nothing.

    Raises:
        UserError: bad arguments; an autoencoder, a model or text that cannot be read; an autoencoder that does not fit
            the language model (before any token goes through it); or a metric of the only autoencoder is not finite.
    """
    _check(arguments)
    if arguments.rewrites:
        subject, ratio = open_run(arguments.run), arguments.release_ratio
    else:
        subject, ratio = open_autoencoders(arguments.saes, arguments.model, arguments.layer, arguments.site), None
    open_options = [name for name in ("revision", "lm_quantization") if getattr(arguments, name) is None]
    check_one_model(subject.runs, [name for name in open_options if name != "revision" or arguments.model is None])
    own, length = subject.config, arguments.length or common_length(subject.runs)
    subject.config = at_length(own, own.length if length is None else length)
    source = choose_source(subject.runs.values(), arguments.data, arguments.column)
    if arguments.format == "saebench" and subject.sae.cfg.d_out:
        raise UserError("SAEBench's results are of autoencoders, and this is a transcoder; leave out --format.")
    if ratio is not None:
        check_has_thresholds(subject.sae.cfg)
    hysteresis = arguments.hysteresis
    if hysteresis is not None:
        subject.saes = {name: with_hysteresis(sae, hysteresis) for name, sae in subject.saes.items()}
    subject.config = replace(subject.config, **arguments.lm_options(subject.config))
    lm = subject.load_lm(arguments.device)
    trained, sizes = subject.config, subject.config.evaluation
    if arguments.tokens is not None:
        sizes = replace(sizes, sequences=math.ceil(arguments.tokens / trained.length))
    if arguments.ce_sequences is not None:
        sizes = replace(sizes, ce_sequences=arguments.ce_sequences)
    if arguments.massive_ratio is not None:
        sizes = replace(sizes, massive_ratio=arguments.massive_ratio)
    seed = trained.stream_seed if arguments.seed is None else arguments.seed
    text = held_out(source, lm, trained.length, sizes.sequences, seed)
    release = None
    if ratio is not None:
        released = with_release_ratio(subject.sae, ratio, training_sample(own, lm))
        subject.saes = dict.fromkeys(subject.saes, released.sae)
        release = {"ratio": ratio, "threshold_factor": released.factor, "training_l0": released.l0}
    subject.config = replace(trained, data=source.data, evaluation=sizes)
    options = evaluation_options(subject.config) | {"seed": seed}
    with evaluation_progress() as progress:
        results = evaluate_all(subject.saes, lm, [text.batch], **options, progress=progress)
    if len(results) == 1:
        next(iter(results.values())).check_finite()
    other_length = None if trained.length == own.length else trained.length
    return Measured(subject, text, results, release, other_length, hysteresis)


def _check(arguments: Arguments) -> None:
    if not arguments.saes:
        raise UserError("No autoencoder is named; give a run's directory, or others with --model and --layer.")
    check_counts(tokens=arguments.tokens, ce_sequences=arguments.ce_sequences, length=arguments.length)
    for name in ("revision", "lm_dtype", "lm_quantization") if arguments.rewrites else ():
        if getattr(arguments, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} is for autoencoders with --model; a run's metrics are of its own model.")
    if arguments.lm_device_map is not None and arguments.device is not None:
        raise UserError("--lm-device-map divides the language model among all GPUs, without --device; leave one out.")
    massive, ratio = arguments.massive_ratio, arguments.release_ratio
    if massive is not None and not 1.0 <= massive < math.inf:
        raise UserError(f"--massive-ratio is {massive}; it must be finite and at least 1.")
    if ratio is not None and not 0.0 <= ratio <= 1.0:
        raise UserError(f"--release-ratio is {ratio}; it must be from 0 to 1.")
    if arguments.hysteresis is not None and (ratio is not None or arguments.format == "saebench"):
        other = "--release-ratio" if ratio is not None else "--format saebench"
        raise UserError(f"--hysteresis and {other} change or describe the run's autoencoder; leave one of them out.")
    if arguments.format == "saebench" and len(arguments.saes) > 1:
        raise UserError("--format saebench describes one autoencoder; name them one by one.")
    if arguments.format == "saebench" and arguments.out is None and not arguments.rewrites:
        raise UserError("--format saebench needs --out FILE for an autoencoder that is not a run.")
    if arguments.format == "saebench" and arguments.out is None and arguments.length is not None:
        raise UserError("--format saebench with --length needs --out FILE; saebench_core.json is of the run's length.")
    if arguments.out is not None:
        check_output(arguments.out, own=layout.SAEBENCH if arguments.format == "saebench" else None)


def write_run(arguments: Arguments, measured: Measured) -> str:
    """Write the metrics into the directory of a run that `rewrites`; a clause about what was written, or ""."""
    if not arguments.rewrites:
        return ""
    run, (result,) = arguments.run, measured.results.values()
    hysteresis = measured.hysteresis
    if (measured.release, measured.length, hysteresis) == (None, None, None):
        write_eval(result, run, measured.text.source)
        write_report(run)
        return f"{run / layout.EVALUATION} and {run / layout.REPORT}"
    release: dict[str, Any] = {} if measured.release is None else {"release": measured.release}
    ratio = None if not release else release["release"]["ratio"]
    path = run / layout.other_evaluation(ratio, measured.length, hysteresis)
    other = {} if hysteresis is None else {"hysteresis": hysteresis}
    write_json(path, result.metrics | release | other | {"source": measured.text.source or {}})
    return f"{path}; the run's own eval.json and report.png are as they were"


def write_out(arguments: Arguments, measured: Measured) -> bool:
    """Write what ``out`` and ``format`` ask for; whether there was anything."""
    path, results = arguments.out, measured.results
    if arguments.format == "saebench":
        ((name, result),) = results.items()
        output = core_output(name, measured.subject.sae, result, measured.subject.config)
        write_json(path or arguments.run / layout.SAEBENCH, output)
    elif path is not None:
        metrics = {name: result.metrics for name, result in results.items()}
        write_json(path, metrics if len(metrics) > 1 else next(iter(metrics.values())))
    return arguments.format == "saebench" or path is not None
