"""Several processes at once: with torchrun, or forked, which gives each the same environment and costs no imports."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

import tsae.train
from tsae.parallel.processes import processes

HERE = Path(__file__).parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def torchrun(count: int, script: str, *arguments: object, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """Run a script of this folder to its end in ``count`` processes."""
    path = os.pathsep.join([str(HERE.parents[1]), *sys.path])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone"]
    return subprocess.run(
        [*command, str(HERE / script), *map(str, arguments)],
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def fork(count: int, work: Callable[..., None], *arguments: Any, folder: Path, timeout: float = 280) -> str:
    """Call ``work`` in ``count`` processes as torchrun would; what they write to stderr.

    All are forks of one server, which imports torch and tsae once for all calls.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "transformers", "launch"])
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        context.Process(target=_rank, args=(rank, count, store.port, folder / f"stderr-{rank}", work, arguments))
        for rank in range(count)
    ]
    before = dict(os.environ)
    try:
        os.environ |= ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(sys.path)}  # for the server, if this starts it
        for process in ranks:
            process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    deadline = time.monotonic() + timeout
    for process in ranks:
        process.join(max(deadline - time.monotonic(), 0))
    statuses = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    stderr = "".join((folder / f"stderr-{rank}").read_text() for rank in range(count))
    assert statuses == [0] * count, f"exit statuses {statuses}\n{stderr}"
    return stderr


def _rank(rank: int, count: int, port: int, stderr: Path, work: Callable[..., None], arguments: Any) -> None:
    with stderr.open("w") as file:
        os.dup2(file.fileno(), 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the store is the parent's
    torch.set_num_threads(1)
    try:
        work(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def run_jobs(jobs: list[tuple[int, list[str]]]) -> None:
    """Run `tsae.train` with each command line; it must end with the given exit status."""
    with processes(timeout=240):
        for expected, argv in jobs:
            status = tsae.train.main(argv)
            if status != expected:
                raise RuntimeError(f"{argv}: exit status {status}")
