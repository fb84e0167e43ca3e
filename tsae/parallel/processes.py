"""The processes that torchrun started: their mesh, their devices, and how they agree on errors and signals."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tsae.config import TrainConfig
from tsae.errors import UserError
from tsae.parallel.axis import SINGLE_PROCESS, Axis, Ranks
from tsae.parallel.environment import is_rank0, local_rank, process_name, world_size
from tsae.utils.interrupts import AtSafePoint, Interrupted
from tsae.utils.progress import console

T = TypeVar("T")


def local_rank0_first(work: Callable[[], T]) -> T:
    """What ``work`` returns; a machine's first process does it before the machine's others, who find what it left."""
    if dist.is_initialized() and local_rank() == 0:
        try:
            return work()
        finally:
            dist.barrier()
    if dist.is_initialized():
        dist.barrier()
    return work()


def check_mesh(cfgs: Iterable[TrainConfig]) -> None:
    """Raise `UserError` unless the processes can be a mesh as the runs ask for it."""
    size = world_size()
    for cfg in cfgs:
        features = cfg.parallel.features
        if size == 1 and features > 1:
            raise UserError(
                f"parallel.features is {features}, but there is 1 process; start several with torchrun "
                f"--nproc-per-node {features} -m tsae.train."
            )
        if size % features:
            raise UserError(f"parallel.features is {features}; it must divide the number of processes, {size}.")
        if size > 1 and cfg.buffer.ahead > 0:
            raise UserError(
                f"buffer.ahead is {cfg.buffer.ahead} with {size} processes, which harvest in turn with training; leave "
                "it out."
            )
        if cfg.chunk and size > features:
            raise UserError(
                f"chunk is {cfg.chunk} with {size // features} shares of the batch; start fewer processes, or leave "
                "chunk out: every share is smaller than the batch already."
            )
        if cfg.batch < size // features:
            raise UserError(
                f"batch is {cfg.batch}, which {size // features} processes cannot share; give every one a sequence."
            )
        if size > 1 and ":" in cfg.device:
            raise UserError(
                f"device is {cfg.device!r}, but there are {size} processes, which each take one of their own; use "
                "auto, cpu or cuda."
            )


@contextmanager
def processes(timeout: int) -> Iterator[None]:
    """Within the block the processes of torchrun can speak to each other: by gloo on CPUs, by NCCL on GPUs.

    Without torchrun, and where they can already, nothing is done. An error that is no `UserError` ends the process
    here, with status 1.

    timeout: seconds that a process waits for the others before it gives up
    """
    if world_size() == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    if not is_rank0():
        console.quiet = True
        logging.getLogger("tsae").setLevel(logging.ERROR)
    try:
        yield
    except UserError as error:
        if not error.agreed and not is_rank0():
            sys.stderr.write(f"error, {process_name()}: {error}\n")
        dist.destroy_process_group()
        raise
    except Interrupted as stop:
        if stop.advice:  # of all at once
            dist.destroy_process_group()
        raise
    except Exception as error:
        _report_failure(error)
        os._exit(1)  # at once: what is left of a collective could keep the process
    dist.destroy_process_group()


def make_ranks(features: int, device: str) -> Ranks:
    """The mesh of all processes, ``features`` of them to each dictionary; `SINGLE_PROCESS` where there is one.

    device: "cpu" or "cuda"
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return SINGLE_PROCESS
    from torch.distributed.device_mesh import init_device_mesh

    size = dist.get_world_size()
    mesh = init_device_mesh(device, (size // features, features), mesh_dim_names=("data", "features"))
    data, parts = mesh.get_group("data"), mesh.get_group("features")
    return Ranks(Axis(data), Axis(parts), Axis(dist.group.WORLD), mesh)


def ranks_for(cfg: TrainConfig) -> Ranks:
    """`make_ranks` for a run."""
    cuda = cfg.device.startswith("cuda") or (cfg.device == "auto" and torch.cuda.is_available())
    return make_ranks(cfg.parallel.features, "cuda" if cuda and torch.cuda.is_available() else "cpu")


def raise_on_all_ranks(work: Callable[[], T]) -> T:
    """What ``work`` returns, on every process its own; a `UserError` on any of them is raised on all."""
    if not dist.is_initialized():
        return work()
    result, message = None, None
    try:
        result = work()
    except UserError as error:
        message = str(error)
    messages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    found = [each for each in messages if each is not None]
    if found:
        raise _agreed(found[0])
    return result  # type: ignore[return-value]


def broadcast_from_rank0(work: Callable[[], T]) -> T:
    """What ``work`` returns on the first process, on all of them; its `UserError` likewise."""
    if not dist.is_initialized():
        return work()
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer = [work(), None]
        except UserError as error:
            answer = [None, str(error)]
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise _agreed(answer[1])
    return answer[0]


def _agreed(message: str) -> UserError:
    error = UserError(message)
    error.agreed = True
    return error


def check_on_all_ranks(check: Callable[[], None], ranks: Ranks, every: int = 1) -> Callable[[], None]:
    """``check``, which raises `AtSafePoint` after a signal, as one that raises it on all processes or on none.

    every: calls that one question to the others stands for; all processes must call it as often
    """
    if ranks.world.size == 1:
        return check
    calls = 0

    def ask() -> None:
        nonlocal calls
        calls += 1
        if calls % every:
            return
        number = 0
        try:
            check()
        except AtSafePoint as stop:
            number = stop.number
        number = int(ranks.world.max_no_grad(torch.tensor(number)))
        if number:
            raise AtSafePoint(number)

    return ask


def _report_failure(error: Exception) -> None:
    """Say which process failed, and of what; for torchrun's own summary too.

    A process whose peer is gone says so in a line: the peer has the traceback.
    """
    who = process_name()
    if _is_about_others(error):
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        sys.stderr.write(f"{who} stopped, as another one is gone: {reason}\n")
    else:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        sys.stderr.write(f"{who} failed:\n" + "".join(traceback.format_exception(error)))
        handler = get_error_handler()
        handler.initialize()
        handler.record_exception(error)
    sys.stderr.flush()


def _is_about_others(error: Exception) -> bool:
    text = str(error)
    signs = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)
