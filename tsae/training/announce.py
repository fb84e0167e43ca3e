"""What training prints before the first step and after the last."""

from __future__ import annotations

from tsae.config import TrainConfig
from tsae.data.buffer import ActivationBuffer
from tsae.data.harvest import ActivationBatch
from tsae.data.norms import report_norms
from tsae.presets import SEQUENCE_COUNTS
from tsae.training.assemble import Setup
from tsae.training.memory import BUFFER, check_memory, memory_parts
from tsae.utils.output import console


def announce(setup: Setup, buffer: ActivationBuffer) -> None:
    """Print the job in a few lines: model and runs, counts at another length than 128, buffer, estimated memory,
    processes.

    Raises:
        UserError: it needs more memory than the machine has.
    """
    job, cfg, lm, world = setup.job, setup.job.shared, setup.lm, setup.ranks.world
    autocast = setup.uses_autocast(cfg)
    parts = memory_parts(job.runs, lm, buffer, setup.storage_dtype, setup.device, autocast=autocast)
    what = f"{len(job.runs)} autoencoders"
    if len(job.runs) == 1:
        what = f"{cfg.sae.d_sae} {cfg.sae.activation} features" + (" (bfloat16 autocast)" if autocast else "")
    where = f"on {setup.device}" if cfg.lm_device == "auto" else f"on {lm.device}, autoencoder on {setup.device}"
    console.print(
        f"{cfg.preset}: {lm.name} {cfg.described} ({str(lm.dtype).removeprefix('torch.')}) {where}, "
        f"{what}, {cfg.steps} steps of {cfg.batch} x {cfg.length} tokens."
    )
    if cfg.length != TrainConfig.length:
        console.print(sequence_counts(cfg), soft_wrap=True)
    console.print(
        f"Activation buffer: at most {buffer.capacity} sequences, {parts[BUFFER] / 2**20:,.0f} MiB "
        f"({str(setup.storage_dtype).removeprefix('torch.')}); each is trained on {cfg.buffer.reuse} times."
    )
    sizes = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in parts.items())
    where = "" if world.size == 1 else " for a single process"
    console.print(f"Memory, estimated{where}, in MiB: {sizes}; in all {sum(parts.values()) / 2**20:,.0f}.")
    if world.size == 1:
        check_memory(parts, setup.device, lm.device)
    else:
        data, features = setup.ranks.data.size, setup.ranks.features.size
        console.print(f"{world.size} processes: the batch in {data} shards, the dictionary in {features}.")


def sequence_counts(cfg: TrainConfig) -> str:
    """A sentence with the values of the options that count sequences."""
    values = []
    for group, names in SEQUENCE_COUNTS.items():
        part = getattr(cfg, group) if group else cfg
        values += [f"{group}{'.' * bool(group)}{name} {getattr(part, name)}" for name in names]
    counts = ", ".join(value for value in values if not value.endswith((" 0", " -1")))
    return (
        f"Sequences of {cfg.length} tokens: {counts}; those that were not given have the tokens that the preset gives "
        "them (docs/howto/length.md)."
    )


def report_massive(cfg: TrainConfig, first: ActivationBatch) -> float:
    """Print what the tokens of ``first`` with massive activations hold, and what becomes of them.

    out: the norm above which ``buffer.max_norm_ratio`` leaves tokens out; with 0, that of `evaluation.massive_ratio`
    """
    left_out = cfg.buffer.max_norm_ratio
    if cfg.target is not None:
        first = ActivationBatch(first.x[..., : cfg.sae.d_in], first.segments)
    found = report_norms(*first, left_out or cfg.evaluation.massive_ratio)
    if found.large or left_out:
        advice = "they are left out of training" if left_out else "--buffer.max-norm-ratio leaves such tokens out"
        console.print(
            f"Norms of the first {found.tokens:,} tokens: {found.large:,} above {found.ratio:g} times the median, "
            f"{found.median:.4g}, hold {found.share:.2%} of the squared norm; {advice}.",
            soft_wrap=True,
        )
    return found.limit


def print_waiting(before: float, during: float, seconds: float) -> None:
    """Print the seconds that training waited for activations: before its first step, and of its ``seconds``."""
    console.print(
        f"Waited for activations: {before:.1f} s before the first step, {during:.1f} s of the {seconds:.1f} s of "
        f"training ({during / max(seconds, 1e-9):.0%})."
    )
