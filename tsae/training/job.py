"""What one command trains: its runs, what they share, and the counts that follow from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsae.config import TrainConfig
from tsae.errors import UserError
from tsae.utils.config_json import to_dict
from tsae.utils.nested import flatten

# The options that decide the stream of activations, its evaluation and its checkpoints.
SHARED = (
    *("model", "revision", "layer", "site", "target", "data", "text", "steps", "length", "batch", "data_seed"),
    *("device", "lm_device", "lm_dtype", "buffer", "evaluation", "checkpoint", "cache", "parallel"),
    *("lm_device_map", "lm_quantization", "trust_remote_code"),
)


@dataclass(frozen=True)
class Job:
    """Autoencoders that train on one stream of activations.

    runs: configurations by name; a single run, which is no sweep, has the name ""
    directory: the run's, or the sweep's, with run NAME in ``directory / NAME`` and `checkpoint/` for all
    """

    runs: dict[str, TrainConfig]
    directory: Path

    @property
    def shared(self) -> TrainConfig:
        """A configuration that has the common values of the options in `SHARED`."""
        return next(iter(self.runs.values()))

    @property
    def is_sweep(self) -> bool:
        """Whether the runs were started together, by ``--sweep``."""
        return "" not in self.runs

    @property
    def sequences_trained(self) -> int:
        """Sequences drawn from the buffer in all steps."""
        return self.shared.steps * self.shared.batch

    @property
    def sequences_harvested(self) -> int:
        """Distinct sequences, each of which is drawn ``buffer.reuse`` times."""
        return -(-self.sequences_trained // self.shared.buffer.reuse)

    @property
    def forward_batch(self) -> int:
        """Sequences per forward pass of the language model."""
        return min(self.shared.buffer.harvest_batch, self.sequences_harvested)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a batch."""
        return self.shared.batch * self.shared.length

    def check(self) -> None:
        """Raise `UserError` for the first invalid value, with the name of the run."""
        for name, cfg in self.runs.items():
            with prefix_errors(name):
                cfg.check()


def check_agreement(runs: dict[str, TrainConfig]) -> None:
    """Raise `UserError`, with the run and the option, unless all runs have the same values for `SHARED`."""
    (first, reference), *others = runs.items()
    wanted = _shared_options(reference)
    for name, cfg in others:
        for option, value in _shared_options(cfg).items():
            if value != wanted.get(option):
                raise UserError(
                    f"Run {name!r} has {option} = {value!r} and run {first!r} {wanted.get(option)!r}, but the runs of "
                    "a sweep share one stream of activations; put it under base, or make two sweeps."
                )


def _shared_options(cfg: TrainConfig) -> dict[str, Any]:
    """The options of `SHARED` by dotted name."""
    values = to_dict(cfg) | {"data_seed": cfg.stream_seed}
    return flatten({name: values[name] for name in SHARED})


@contextmanager
def prefix_errors(name: str) -> Iterator[None]:
    """Put the name of a run, if it has one, before the message of a `UserError`."""
    try:
        yield
    except UserError as error:
        if not name:
            raise
        raise type(error)(f"Run {name!r}: {error}") from None
