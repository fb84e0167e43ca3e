"""What a job trains with: the language model, the device, the text, the stream of activations and its buffer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from tsae.config import TrainConfig
from tsae.data.buffer import ActivationBuffer
from tsae.data.cache import ActivationCache
from tsae.data.cache_key import cache_key, provenance
from tsae.data.feed import ActivationFeed, no_progress
from tsae.data.harvest import ActivationBatch, Harvester
from tsae.data.prefetching import PrefetchingFeed
from tsae.data.sequences import SequenceStream
from tsae.data.text import Document, Part, absolute_source, open_text, split_threshold
from tsae.errors import UserError
from tsae.evaluation.held_out import evaluation_batches
from tsae.evaluation.subject import check_module
from tsae.lm.loading import LanguageModel, absolute_name, default_dtype, load_language_model
from tsae.lm.site import Site
from tsae.lm.trial_run import check_order, check_site, site_width, width
from tsae.parallel.axis import SINGLE_PROCESS, Ranks
from tsae.parallel.buffer import DistributedActivationBuffer
from tsae.parallel.processes import check_mesh, check_on_all_ranks, local_rank0_first, raise_on_all_ranks
from tsae.rundir.ownership import check_output_directory
from tsae.sae.metadata import site_of
from tsae.sae.model import SparseAutoencoder
from tsae.sae.normalization import InputNormalizer
from tsae.training.init_from import absolute_init, bos_warnings, open_checked
from tsae.training.job import Job, prefix_errors
from tsae.training.own_terms import check_own_terms
from tsae.training.sparse_step import check_steps
from tsae.utils.device import resolve_device
from tsae.utils.paths import expanded
from tsae.utils.progress import bar
from tsae.utils.torchrun import world_size

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """A job that is ready to train.

    job: with checked and completed configurations
    device: where the autoencoders train
    ranks: position of this process
    sources: of new runs with `init_from`, by name, the autoencoders that they start from
    """

    job: Job
    lm: LanguageModel
    device: torch.device
    ranks: Ranks = SINGLE_PROCESS
    sources: dict[str, SparseAutoencoder] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Width of the stored activations: of the input, and of a target beside it."""
        return width(self.lm, self.job.shared.place, self.job.shared.target_place)

    @property
    def storage_dtype(self) -> torch.dtype:
        """The dtype in which activations are stored."""
        name = self.job.shared.buffer.dtype
        return self.lm.dtype if name == "auto" else getattr(torch, name)

    @property
    def prefetched(self) -> int:
        """Sequences harvested ahead of training, at most."""
        gpu = self.lm.device.type == "cuda"
        return self.job.shared.buffer.prefetched(self.job.sequences_harvested, gpu=gpu)

    def uses_autocast(self, cfg: TrainConfig) -> bool:
        """Whether the matrix products of a run's autoencoder use bfloat16."""
        return default_dtype(self.device) == torch.bfloat16 if cfg.autocast == "auto" else cfg.autocast == "bfloat16"


class Stream(NamedTuple):
    """Activations from their beginning, and the buffer that batches are drawn from."""

    feed: ActivationFeed | PrefetchingFeed
    buffer: ActivationBuffer


def prepare(job: Job, *, resume: bool = False) -> Setup:
    """Check and complete the configurations and load the language model. Writes nothing.

    resume: the runs have begun: what they started from may be gone, and their configurations are complete

    Raises:
        UserError: a value makes no sense, or the model, the text or the place of the cache cannot be used.
    """
    job.check()
    if job.shared.target is not None and world_size() > 1:
        raise UserError("Transcoders (target) are trained in one process; start it without torchrun.")
    check_mesh(job.runs.values())
    device, lm_device = resolve_device(job.shared.device), resolve_lm_device(job.shared)
    for name, cfg in job.runs.items():
        with prefix_errors(name):
            check_own_terms(cfg)
            check_steps(cfg, device, world_size())
    # Absolute, so that the run can be resumed and evaluated from another directory.
    common = replace(
        job.shared,
        data=absolute_source(job.shared.data),
        model=absolute_name(job.shared.model),
        cache=None if job.shared.cache is None else str(expanded(job.shared.cache).absolute()),
    )
    if common.cache is not None:
        check_output_directory(Path(common.cache), job.directory, *(job.directory / name for name in job.runs))
    sources = {}
    for name, cfg in () if resume else job.runs.items():
        if cfg.init_from is not None:
            with prefix_errors(name):
                sources[name] = local_rank0_first(partial(open_checked, cfg, job.directory))
    next(iter(_text(common, "train")(0)))  # unusable text is reported before the model is loaded
    common = replace(common, text=replace(common.text, threshold=split_threshold(common.data, common.text)))
    prepend_bos = _prepend_bos(common, resume=resume)
    lm = local_rank0_first(
        lambda: load_language_model(common.model, device=lm_device, prepend_bos=prepend_bos, **common.lm_options)
    )
    if lm.prefix_id is None and common.text.prepend_bos == "yes":
        raise UserError(
            f"text.prepend_bos is yes, but the tokenizer of {lm.name} has neither BOS nor EOS; set it to auto."
        )
    for name, source in sources.items():
        with prefix_errors(name):
            said = site_of(source.metadata)
            advice = "" if said is None else f"name that place with --site {said.option}"
            check_module(job.runs[name].init_from or "", source, lm, common.place, advice=advice)
        for warning in bos_warnings(job.runs[name], source, lm.prefix_id):
            log.warning("%s.", warning)
    if not resume:
        prepended: Literal["yes", "no"] = "no" if lm.prefix_id is None else "yes"
        common = replace(common, text=replace(common.text, prepend_bos=prepended))
    check_site(lm, common.place, 1 + common.length, predictions=common.evaluation.final)
    target = common.target_place
    if target is not None:
        check_site(lm, target, 1 + common.length)
        check_order(lm, common.place, target)
    # Likewise text that is too short for a forward pass.
    _sequences(common, lm).next_batch(job.forward_batch)
    if common.evaluation.final:
        evaluation_batches(common, lm, 1)
    runs = {}
    for name, cfg in job.runs.items():
        with prefix_errors(name):
            sae = replace(cfg.sae, d_in=matching_width(cfg, lm))
            if target is not None:
                sae = replace(sae, d_out=matching_width(cfg, lm, target), apply_b_dec_to_input=False)
        runs[name] = replace(cfg, data=common.data, model=common.model, text=common.text, cache=common.cache, sae=sae)
        runs[name] = replace(runs[name], init_from=absolute_init(cfg.init_from))
    return Setup(replace(job, runs=runs), lm, device, sources=sources)


def resolve_lm_device(cfg: TrainConfig) -> torch.device:
    """Where the language model runs.

    Raises:
        UserError: there is no such device, or several processes would share it.
    """
    if cfg.lm_device_map != "none" and (cfg.lm_device != "auto" or world_size() > 1):
        other = f"lm_device is {cfg.lm_device!r}" if world_size() == 1 else f"there are {world_size()} processes"
        raise UserError(
            f"lm_device_map is {cfg.lm_device_map!r}, which divides the language model among all GPUs, and {other}; "
            "leave one of them out."
        )
    if cfg.lm_device == "auto":
        return resolve_device(cfg.device)
    if world_size() > 1:
        raise UserError(
            f"lm_device is {cfg.lm_device!r}, but there are {world_size()} processes, each with the language model on "
            "its own device; leave lm_device out."
        )
    return resolve_device(cfg.lm_device)


def matching_width(cfg: TrainConfig, lm: LanguageModel, target: Site | None = None) -> int:
    """The width of the activations, or of a target, which ``sae.d_in`` or ``sae.d_out`` must equal if it is given."""
    name, given = ("d_in", cfg.sae.d_in) if target is None else ("d_out", cfg.sae.d_out)
    found = site_width(lm, target or cfg.place)
    if given not in (0, found) and cfg.init_from is not None:
        where = f"the blocks of {lm.name} put out" if cfg.place.kind == "resid_post" else f"{cfg.place.name} has"
        raise UserError(
            f"{cfg.init_from} takes activations of width {given}, but {where} {found}; name the model that it was "
            "trained on."
        )
    if given not in (0, found):
        raise UserError(f"sae.{name} is {given}, but {lm.name} has width {found}; leave sae.{name} out.")
    return found


def estimated(cfg: TrainConfig, sample: ActivationBatch) -> InputNormalizer:
    """The normalizer of a run, with ``cfg.sae.d_in`` set, from its first activations."""
    if cfg.target is not None:
        return InputNormalizer.estimate_pair(*sample, cfg.sae.d_in)
    return InputNormalizer.estimate(*sample)


def _text(cfg: TrainConfig, part: Part) -> Callable[[int], Iterator[Document]]:
    """A function from the epoch to the documents of one part of the run's text."""
    return lambda epoch: open_text(cfg.data, part=part, seed=cfg.stream_seed, config=cfg.text, epoch=epoch)


def _sequences(cfg: TrainConfig, lm: LanguageModel) -> SequenceStream:
    """The run's training text as sequences, from its beginning."""
    return SequenceStream(_text(cfg, "train"), lm.tokenizer, cfg.length, prefix=lm.prepend_bos)


def _prepend_bos(cfg: TrainConfig, *, resume: bool) -> bool | None:
    """What `text.prepend_bos` asks of `load_language_model`.

    The configuration of a run says yes or no, unless it is of an earlier version, which prepended BOS to all sequences.
    """
    asked = cfg.text.prepend_bos
    if asked == "auto":
        return True if resume else None
    return asked == "yes"


@contextmanager
def open_stream(setup: Setup, check: Callable[[], None]) -> Iterator[Stream]:
    """The activations of the job, with its cache and prefetching.

    check: called between forward passes; raises `AtSafePoint` after a signal

    Raises:
        UserError: the cache cannot be used.
    """
    with ExitStack() as stack:
        cache = raise_on_all_ranks(lambda: open_cache(setup, write=True))
        if cache is not None:
            stack.enter_context(cache)
        source = raise_on_all_ranks(lambda: make_feed(setup, cache, check))
        feed: ActivationFeed | PrefetchingFeed = source
        if setup.prefetched and setup.ranks.world.size == 1:
            shown, feed.bar = feed.bar, no_progress  # one bar at a time, in this thread
            total = setup.job.sequences_harvested
            feed = stack.enter_context(PrefetchingFeed(source, setup.prefetched, total, shown, setup.lm.device))
        yield Stream(feed, make_buffer(setup, feed))


def open_cache(setup: Setup, *, write: bool) -> ActivationCache | None:
    """The cache of the job, if it has one; with ``write`` it is locked if it holds less than the job needs.

    Raises:
        UserError: it does not match the job, another process writes to it, or it is too small for several processes.
    """
    job, cfg = setup.job, setup.job.shared
    if cfg.cache is None:
        return None
    group = job.forward_batch
    key = cache_key(cfg, setup.lm, setup.storage_dtype, group)
    cache = ActivationCache(Path(cfg.cache), key, provenance(setup.lm), group=group)
    if write and cache.groups * group < job.sequences_harvested:
        if setup.ranks.world.size > 1:
            raise UserError(
                f"The cache {cfg.cache} has {cache.groups * group} sequences, and the run needs "
                f"{job.sequences_harvested}; several processes only read a cache, so fill it with a run in one "
                "process, or leave out --cache."
            )
        cache.lock()
    return cache


def make_feed(
    setup: Setup, cache: ActivationCache | None = None, check: Callable[[], None] = lambda: None
) -> ActivationFeed:
    """The activations of the job from their beginning; ``check`` is called between forward passes.

    Of N processes each runs the language model on every N-th group of sequences. They exchange signals once per N
    groups.
    """
    cfg, world = setup.job.shared, setup.ranks.world
    stream = _sequences(cfg, setup.lm)
    batch, dtype, target = setup.job.forward_batch, setup.storage_dtype, cfg.target_place
    harvester = Harvester(setup.lm, cfg.place, stream, batch=batch, dtype=dtype, target=target)
    checking_bar = partial(_checking_bar, check_on_all_ranks(check, setup.ranks, world.size))
    return ActivationFeed(harvester, cache, checking_bar, world.rank, world.size)


@contextmanager
def _checking_bar(check: Callable[[], None], what: str, tokens: int) -> Iterator[Callable[[int], None]]:
    """A progress bar that calls ``check`` when it advances."""
    with bar(what, tokens) as advance:

        def advance_and_check(done: int) -> None:
            advance(done)
            check()

        yield advance_and_check


def make_buffer(setup: Setup, feed: ActivationFeed | PrefetchingFeed) -> ActivationBuffer:
    """The buffer of the job, empty, filled from ``feed``."""
    cfg = setup.job.shared
    order = torch.Generator().manual_seed(cfg.stream_seed + 2)
    size = (cfg.buffer.sequences, cfg.buffer.reuse, setup.job.sequences_trained)
    if setup.ranks.world.size > 1:
        return DistributedActivationBuffer(feed, *size, order, setup.ranks)
    return ActivationBuffer(feed, *size, order)
