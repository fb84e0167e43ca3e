"""What a run is assembled from: the language model, the text, the activations, the buffer and the evaluation text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tsae.config import LENGTH, TrainConfig
from tsae.data.buffer import ActivationBuffer
from tsae.data.cache import ActivationCache
from tsae.data.cache_request import cache_request, made_with
from tsae.data.feed import Feed
from tsae.data.harvest import ActivationBatch, Harvester
from tsae.data.sequences import SequenceStream
from tsae.data.text import Document, Part, absolute_source, open_text, split_threshold
from tsae.errors import UserError
from tsae.evaluation.held_out import evaluation_batches
from tsae.lm.hooks import check_layer
from tsae.lm.loading import LanguageModel, absolute_name, default_dtype, load_language_model
from tsae.parallel.axis import SINGLE_PROCESS, Ranks
from tsae.parallel.buffer import DistributedActivationBuffer
from tsae.parallel.processes import check_mesh, check_on_all_ranks, local_rank0_first
from tsae.utils.device import resolve_device
from tsae.utils.progress import bar


def prepare(cfgs: dict[str, TrainConfig]) -> tuple[dict[str, TrainConfig], LanguageModel, torch.device]:
    """What a run begins with: ``cfgs`` checked and completed, the language model, and the device. Writes nothing.

    Raises:
        UserError: a value makes no sense, or the model or the text cannot be used.
    """
    for name, cfg in cfgs.items():
        with prefix_errors(name):
            cfg.check()
    check_mesh(cfgs.values())
    common = next(iter(cfgs.values()))
    device = resolve_device(common.device)
    # Absolute, so that the run can be gone on with and evaluated from anywhere.
    common = replace(
        common,
        data=absolute_source(common.data),
        model=absolute_name(common.model),
        cache=None if common.cache is None else str(Path(common.cache).expanduser().absolute()),
    )
    lm, common = _open(common, device)
    for name, cfg in cfgs.items():
        with prefix_errors(name):
            sae = replace(cfg.sae, d_in=matching_width(cfg, lm))
            cfg = replace(cfg, data=common.data, model=common.model, text=common.text, cache=common.cache, sae=sae)
            cfgs = cfgs | {name: cfg}
    return cfgs, lm, device


@contextmanager
def prefix_errors(name: str) -> Iterator[None]:
    """Put the run's name before the sentence of a `UserError`."""
    try:
        yield
    except UserError as error:
        if not name:
            raise
        raise type(error)(f"Run {name!r}: {error}") from None


def _open(cfg: TrainConfig, device: torch.device) -> tuple[LanguageModel, TrainConfig]:
    """The language model, and ``cfg`` with the text's split; whatever of the model, of the layer and of the text is
    unusable is found here."""
    next(iter(_text(cfg, "train")(0)))  # unusable text is reported before the model is loaded
    cfg = replace(cfg, text=replace(cfg.text, threshold=split_threshold(cfg.data, cfg.text)))
    lm = local_rank0_first(
        lambda: load_language_model(cfg.model, device=device, dtype=cfg.lm_dtype, revision=cfg.revision)
    )
    check_layer(lm, cfg.layer)
    # Likewise text that is too short for a forward pass of the harvest.
    SequenceStream(_text(cfg, "train"), lm.tokenizer, LENGTH).next_batch(harvest_group(cfg))
    if cfg.evaluation.final:
        evaluation_batches(cfg, lm, 1)
    return lm, cfg


def matching_width(cfg: TrainConfig, lm: LanguageModel) -> int:
    """The model's width, which a configured ``sae.d_in`` must equal."""
    if cfg.sae.d_in not in (0, lm.d_model):
        raise UserError(f"sae.d_in is {cfg.sae.d_in}, but {lm.name} has width {lm.d_model}; leave sae.d_in out.")
    return lm.d_model


def uses_autocast(cfg: TrainConfig, device: torch.device) -> bool:
    """Whether matrix products of the autoencoder run in bfloat16."""
    return default_dtype(device) == torch.bfloat16 if cfg.autocast == "auto" else cfg.autocast == "bfloat16"


def _text(cfg: TrainConfig, part: Part) -> Callable[[int], Iterator[Document]]:
    """The run's text, one part of it, by epoch."""
    return lambda epoch: open_text(cfg.data, part=part, seed=cfg.stream_seed, config=cfg.text, epoch=epoch)


def demand(cfg: TrainConfig) -> int:
    """Sequences that are drawn in all."""
    return cfg.steps * cfg.batch


def harvest_group(cfg: TrainConfig) -> int:
    """Sequences per forward pass of the harvest."""
    return min(cfg.buffer.harvest_batch, -(-demand(cfg) // cfg.buffer.reuse))


def storage_dtype(cfg: TrainConfig, lm: LanguageModel) -> torch.dtype:
    """Type that activations are kept in."""
    return lm.dtype if cfg.buffer.dtype == "auto" else getattr(torch, cfg.buffer.dtype)


def open_cache(
    cfg: TrainConfig, lm: LanguageModel, *, write: bool, ranks: Ranks = SINGLE_PROCESS
) -> ActivationCache | None:
    """The run's cache, if it has one; with ``write``, locked if it has less than the run will ask for.

    Raises:
        UserError: it does not match the run, or another process writes to it, or has too little for several processes.
    """
    if cfg.cache is None:
        return None
    group = harvest_group(cfg)
    request = cache_request(cfg, lm, storage_dtype(cfg, lm), group)
    cache = ActivationCache(Path(cfg.cache), request, made_with(lm), group=group)
    if write and cache.groups * group * cfg.buffer.reuse < demand(cfg):
        if ranks.world.size > 1:
            raise UserError(
                f"The cache {cfg.cache} has {cache.groups * group} sequences, and the run takes "
                f"{-(-demand(cfg) // cfg.buffer.reuse)}; several processes only read a cache, so fill it with a run in "
                "one process, or leave out --cache."
            )
        cache.lock()
    return cache


def make_feed(
    cfg: TrainConfig,
    lm: LanguageModel,
    cache: ActivationCache | None = None,
    check: Callable[[], None] = lambda: None,
    ranks: Ranks = SINGLE_PROCESS,
) -> Feed:
    """The run's activations from their beginning; ``check`` is called between forward passes.

    With several processes each runs the language model on every so many-th group of sequences, and they ask each other
    for signals once in so many groups.
    """
    stream = SequenceStream(_text(cfg, "train"), lm.tokenizer, LENGTH)
    harvester = Harvester(lm, cfg.layer, stream, batch=harvest_group(cfg), dtype=storage_dtype(cfg, lm))
    world = ranks.world
    check = check_on_all_ranks(check, ranks, world.size)
    if world.size == 1:
        return Feed(harvester, cache, partial(_checking_bar, check))

    def has(group: int) -> bool:
        return group % world.size == world.rank

    return Feed(harvester, cache, partial(_checking_bar, check), has)


@contextmanager
def _checking_bar(check: Callable[[], None], what: str, tokens: int) -> Iterator[Callable[[int], None]]:
    """A bar whose progress calls ``check``."""
    with bar(what, tokens) as advance:

        def advance_and_check(done: int) -> None:
            advance(done)
            check()

        yield advance_and_check


def make_buffer(
    cfg: TrainConfig, feed: Callable[[int], Iterator[ActivationBatch]], ranks: Ranks = SINGLE_PROCESS
) -> ActivationBuffer:
    """The run's buffer, empty, in front of ``feed``."""
    order = torch.Generator().manual_seed(cfg.stream_seed + 2)
    size = (cfg.buffer.sequences, cfg.buffer.reuse, demand(cfg))
    if ranks.world.size > 1:
        return DistributedActivationBuffer(feed, *size, order, ranks)
    return ActivationBuffer(feed, *size, order)
