"""Random `kill -9`s of real runs: every restart must complete with the weights of an uninterrupted run.

    python tests/helpers/kill_campaign.py --kills 50 --signals 8 --seed 0

One process imports everything once; each attempt forks it, runs `tsae.train.main` and is killed at a random moment: any
moment of the run, or soon after the files of the targeted part appear. With `--signals`, some attempts get SIGINT or
SIGTERM instead and must exit by themselves within ten seconds, with a one-line message.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# The parent stays single-threaded: a fork would copy locks that other threads hold.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from matplotlib.figure import Figure
from packed_gemma import original_model, stand_in, write_packed
from tiny import save_model
from tiny_runs import lines, options, write_text

from tsae.lm.gemma_package import GEMMA
from tsae.train import main

LONGEST = 240  # seconds of an attempt before it counts as hung
MOST_IN_A_ROW = 4  # kills of one run


@dataclass
class Part:
    """One kind of run to kill.

    name: its name; command: (directory) -> arguments of `tsae.train`
    pattern: glob, below the directory, of the files that exist while the target is being written
    share: its weight in the number of kills
    """

    name: str
    command: Callable[[Path], list[str]]
    pattern: str
    share: int


def parts(models: Path) -> list[Part]:
    def command(directory: Path, more: str, model: Path | str = models / "gemma2") -> list[str]:
        return options(Path(model), models / "text.txt", directory / "run", *more.split(), "--evaluation.no-final")

    short = "--checkpoint.every 1 --optimizer.noise-eta 0.1"
    wide = f"{short} --sae.d-sae 8192 --steps 8"
    cached = f"{short} --buffer.sequences 12 --buffer.estimate-sequences 4 --buffer.harvest-batch 2"
    return [
        Part("training", lambda d: command(d, short), "run/checkpoint/step-*", 3),
        Part("checkpoints", lambda d: command(d, wide), "run/checkpoint/.tmp-step-*", 3),
        Part("caching", lambda d: [*command(d, cached), "--cache", str(d / "cache")], "cache/.shard-*.tmp", 2),
        Part("conversion", lambda d: command(d, "--steps 2", GEMMA.name), "models/*.partial", 2),
    ]


def prepare(models: Path) -> None:
    save_model(
        models / "gemma2",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        head_dim=16,
        num_key_value_heads=1,
        query_pre_attn_scalar=16,
    )
    write_text(models / "text.txt")
    write_packed(original_model(), models / "packed.gguf")


class Campaign:
    """All parts, each with an uninterrupted run to compare with."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.random = root, random.Random(seed)
        self.last, self.slowest = 0, 0.0  # status of the last child; seconds that the slowest end by a signal took
        self.models = root / "models"
        self.models.mkdir()
        self._wait(self._fork(self._warm_up, root), root)
        for name in (root / "modules.txt").read_text().split():
            if name not in sys.modules:
                with suppress(Exception):  # some can be imported by the one that needs them alone
                    importlib.import_module(name)
        self.parts = parts(self.models)
        self.seconds: dict[str, float] = {}
        self.sighting: dict[str, float] = {}  # seconds that what is aimed at takes to be written
        self.weights: dict[str, bytes] = {}
        for part in self.parts:
            whole = root / f"{part.name}-whole"
            whole.mkdir()
            before = last = time.monotonic()
            seconds, sightings, there = 0.0, 0, False
            for _ in self._polls(self._start(part.command(whole), whole), whole):
                now, was, there = time.monotonic(), there, any(whole.glob(part.pattern))
                seconds += (now - last) * there
                sightings += there and not was
                last = now
            self.seconds[part.name] = time.monotonic() - before
            self.sighting[part.name] = seconds / max(sightings, 1)
            self.weights[part.name] = self._weights(whole)

    def _warm_up(self) -> None:
        """Make the models, and list the modules that a run imports, so that the parent imports them once."""
        prepare(self.models)
        part, directory = parts(self.models)[-1], self.root / "warm-up"
        directory.mkdir()
        self._wait(self._start(part.command(directory), directory), directory)

    def run(self, kills: int, signals: int) -> Counter[str]:
        """Send ``kills`` SIGKILLs and ``signals`` other signals; how many kills hit the target, by part."""
        hits: Counter[str] = Counter()
        strikes = {part.name: [] for part in self.parts}
        weighted = [part.name for part in self.parts for _ in range(part.share)]
        for i in range(kills):
            strikes[weighted[i % len(weighted)]].append(signal.SIGKILL)
        for i in range(signals):
            strikes[self.parts[i % len(self.parts)].name].append((signal.SIGTERM, signal.SIGINT)[i // 4 % 2])
        for part in self.parts:
            left, chain = strikes[part.name], 0
            while left:
                chain += 1
                hits[part.name] += self._chain(part, self.root / f"{part.name}-{chain}", left)
        return hits

    def _chain(self, part: Part, directory: Path, strikes: list[signal.Signals]) -> int:
        """One run, resumed after each of the first few ``strikes``, which are removed; the number of hits."""
        directory.mkdir()
        hit = 0
        for number in range(MOST_IN_A_ROW + 1):
            resumable = (directory / "run" / "config.json").exists()
            argv = ["--resume", str(directory / "run")] if resumable else part.command(directory)
            child = self._start(argv, directory)
            if number == MOST_IN_A_ROW or not strikes:
                self._wait(child, directory)
                break
            if not self._comes_to(child, part, directory) or not self._strike(child, strikes[0], directory):
                break
            found = sorted(path.name for path in directory.glob(part.pattern))
            hit += bool(found) and strikes[0] is signal.SIGKILL
            print(f"{part.name}: {strikes.pop(0).name} {number + 1} of {directory.name}, at {found}", flush=True)
        self._check(part, directory)
        shutil.rmtree(directory)
        return hit

    def _check(self, part: Part, directory: Path) -> None:
        whole = self.root / f"{part.name}-whole"
        assert self._weights(directory) == self.weights[part.name], f"{directory}: other weights than uninterrupted"
        measured = [
            [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines(d / "run" / "metrics.jsonl")]
            for d in (directory, whole)
        ]
        assert measured[0] == measured[1], f"{directory}: other measurements"
        left = [
            path for path in directory.rglob("*") if path.name.endswith((".tmp", ".partial")) or ".tmp-" in path.name
        ]
        assert not left, f"left behind: {left}"
        if (directory / "cache").is_dir():
            of, wanted = (json.loads((d / "cache" / "manifest.json").read_text()) for d in (directory, whole))
            assert sum(s["sequences"] for s in of["shards"]) == sum(s["sequences"] for s in wanted["shards"])

    def _weights(self, directory: Path) -> bytes:
        return (directory / "run" / "sae" / "sae_weights.safetensors").read_bytes()

    def _start(self, argv: list[str], directory: Path) -> int:
        def child() -> int:
            os.environ["TSAE_CACHE"] = str(directory / "models")
            package = stand_in(self.models / "packed.gguf")
            sys.modules[package.__name__] = package
            Figure.savefig = lambda self, path, **kwargs: Path(path).write_bytes(b"")  # drawing is most of a short run
            for number in (signal.SIGINT, signal.SIGTERM):  # until `main` takes them: as if not yet sent
                signal.signal(number, signal.SIG_IGN)
            status = main(argv)
            if directory.name == "warm-up":
                (self.root / "modules.txt").write_text("\n".join(sys.modules))
            return status

        return self._fork(child, directory)

    def _fork(self, work: Callable[[], int | None], directory: Path) -> int:
        child = os.fork()
        if child:
            return child
        # PyTorch makes its thread pool anew after a fork, at its first use. Of the threads that load a model two may
        # race for it, and one finds none ("Invalid thread pool!"); so it is used here first.
        torch.set_num_threads(1)
        status = 1
        try:
            with (directory / "log.txt").open("a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                status = work() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def _comes_to(self, child: int, part: Part, directory: Path) -> bool:
        """Wait for a random moment of the child; False if it finished before."""
        aimed = part.name != "training" and self.random.random() < 0.8
        if aimed:  # after its files have been seen, and gone again, some times
            sightings = self.random.randrange(1, 5) if part.name != "conversion" else 1
            delay, seen, there = self.random.uniform(0.0, 1.2) * self.sighting[part.name], 0, False
            for _ in self._polls(child, directory):
                before, there = there, any(directory.glob(part.pattern))
                seen += there and not before
                if seen == sightings:
                    break
            else:
                return False
        else:
            delay = self.random.uniform(0.02, 1.0) * self.seconds[part.name]
        deadline = time.monotonic() + delay
        for _ in self._polls(child, directory):
            if time.monotonic() >= deadline:
                return True
        self.seconds[part.name] *= 0.8  # other work on the machine has ended, or less of the run was left
        return False

    def _strike(self, child: int, number: signal.Signals, directory: Path) -> bool:
        """Whether the signal ended the child; otherwise it had just finished."""
        before, load = time.monotonic(), max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
        os.kill(child, number)
        if number is signal.SIGKILL:
            status = os.waitpid(child, 0)[1]
            if os.WIFSIGNALED(status):
                return True
        else:
            for _ in self._polls(child, directory, (0, 130, 143)):
                pass
            seconds, status = time.monotonic() - before, self.last
            self.slowest = max(self.slowest, seconds)
            assert seconds < 10 * load, f"{number.name} took {seconds:.0f} s, with {load:.1f} processes for a core"
            if os.waitstatus_to_exitcode(status) == 128 + number:
                said = (directory / "log.txt").read_text()
                assert "interrupted" in said
                assert "Traceback" not in said
                return True
        self._expect(status, directory)
        return False

    def _polls(self, child: int, directory: Path, right: tuple[int, ...] = (0,)) -> Iterator[None]:
        """Yield at short intervals until the child ends; its status, kept in `last`, must be a ``right`` one."""
        deadline = time.monotonic() + LONGEST
        while time.monotonic() < deadline:
            ended, self.last = os.waitpid(child, os.WNOHANG)
            if ended:
                self._expect(self.last, directory, right)
                return
            yield
            time.sleep(0.0002)
        os.kill(child, signal.SIGKILL)
        raise AssertionError(f"an attempt hung: {(directory / 'log.txt').read_text()[-3000:]}")

    def _wait(self, child: int, directory: Path) -> None:
        for _ in self._polls(child, directory):
            time.sleep(0.005)

    def _expect(self, status: int, directory: Path, right: tuple[int, ...] = (0,)) -> None:
        code = os.waitstatus_to_exitcode(status)
        assert code in right, f"an attempt ended with {code}: {(directory / 'log.txt').read_text()[-3000:]}"


def campaign(kills: int, signals: int, seed: int, directory: Path) -> None:
    before = time.monotonic()
    torch.set_num_threads(1)
    made = Campaign(directory, seed)
    ready = time.monotonic()
    print("uninterrupted, seconds:", {name: round(seconds, 1) for name, seconds in made.seconds.items()}, flush=True)
    hits = made.run(kills, signals)
    now, processor = time.monotonic(), os.times()
    print(f"{kills} kills, seed {seed}: every restart completed, with the same weights; {dict(hits)} while written;")
    print(f"{signals} of SIGINT and SIGTERM: the slowest end took {made.slowest:.2f} s")
    seconds = sum(processor[:4])
    print(
        f"{ready - before:.0f} s of preparation, {now - ready:.0f} s of runs, {seconds:.0f} s of processor time in all"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--signals", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, default=None, help="empty; a temporary one if left out")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        campaign(asked.kills, asked.signals, asked.seed, asked.directory or Path(temporary))
