"""The processes that torchrun started: their mesh, their devices, and errors and signals on all ranks."""

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
from tsae.utils.interrupts import AtSafePoint, Interrupted
from tsae.utils.output import console
from tsae.utils.torchrun import is_rank0, local_rank, process_name, world_size

T = TypeVar("T")


def local_rank0_first(work: Callable[[], T]) -> T:
    """Run ``work`` on the first process of a machine before the others, which then find its results, such as files."""
    if dist.is_initialized() and local_rank() == 0:
        try:
            return work()
        finally:
            dist.barrier()
    if dist.is_initialized():
        dist.barrier()
    return work()


def check_mesh(cfgs: Iterable[TrainConfig]) -> None:
    """Raise `UserError` unless the processes can form the mesh that the runs ask for."""
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
                f"buffer.ahead is {cfg.buffer.ahead} with {size} processes, which do not harvest during training; "
                "leave it out."
            )
        if cfg.chunk and size > features:
            raise UserError(
                f"chunk is {cfg.chunk} with {size // features} shards of the batch; start fewer processes, or leave "
                "chunk out, since every shard is smaller than the batch."
            )
        if cfg.batch < size // features:
            raise UserError(
                f"batch is {cfg.batch}, too few for {size // features} processes; use at least one sequence for each."
            )
        if size > 1 and ":" in cfg.device:
            raise UserError(
                f"device is {cfg.device!r}, but there are {size} processes, each with its own device; use auto, cpu or "
                "cuda."
            )


@contextmanager
def processes(timeout: int) -> Iterator[None]:
    """Within the block the processes of torchrun form a process group: gloo on CPUs, NCCL on GPUs.

    Does nothing without torchrun, or if the group exists. An error other than `UserError` ends the process, status 1.

    timeout: seconds that a process waits for the others before it fails
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
        if not error.on_all_ranks and not is_rank0():
            sys.stderr.write(f"error, {process_name()}: {error}\n")
        dist.destroy_process_group()
        raise
    except Interrupted as stop:
        if stop.advice:  # raised on all ranks
            dist.destroy_process_group()
        raise
    except Exception as error:
        _report_failure(error)
        os._exit(1)  # a pending collective could block a normal exit
    dist.destroy_process_group()


def make_ranks(features: int, device: str) -> Ranks:
    """The mesh of all processes, with ``features`` shards of the dictionary; `SINGLE_PROCESS` for a single one.

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
    """`make_ranks` for the configuration of a run."""
    cuda = cfg.device.startswith("cuda") or (cfg.device == "auto" and torch.cuda.is_available())
    return make_ranks(cfg.parallel.features, "cuda" if cuda and torch.cuda.is_available() else "cpu")


def raise_on_all_ranks(work: Callable[[], T]) -> T:
    """Run ``work`` on every rank and return its result; a `UserError` on any rank is raised on all."""
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
        raise _error_of_all_ranks(found[0])
    return result  # type: ignore[return-value]


def broadcast_from_rank0(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0; its result is returned, or its `UserError` raised, on all ranks."""
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
        raise _error_of_all_ranks(answer[1])
    return answer[0]


def _error_of_all_ranks(message: str) -> UserError:
    error = UserError(message)
    error.on_all_ranks = True
    return error


def check_on_all_ranks(check: Callable[[], None], ranks: Ranks, every: int = 1) -> Callable[[], None]:
    """Wrap ``check`` so that if it raises `AtSafePoint` on any rank, it raises on every rank.

    every: calls between two exchanges of signals; all ranks must call equally often
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
    """Print which process failed and why, and record it for torchrun's summary.

    A process that failed because another one is gone prints one line; the other one has the traceback.
    """
    who = process_name()
    if _is_peer_failure(error):
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        sys.stderr.write(f"{who} stopped because another process is gone: {reason}\n")
    else:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        sys.stderr.write(f"{who} failed:\n" + "".join(traceback.format_exception(error)))
        handler = get_error_handler()
        handler.initialize()
        handler.record_exception(error)
    sys.stderr.flush()


def _is_peer_failure(error: Exception) -> bool:
    text = str(error)
    signs = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)
