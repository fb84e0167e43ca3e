"""TensorBoard and Weights & Biases, beside `metrics.jsonl` and with the same numbers: `--log tensorboard wandb`.

Their packages are the extra `[log]`. A resumed run continues its log: TensorBoard hides what was logged after the
checkpoint; Weights & Biases, which accepts each step once, keeps it (a resumed run repeats it bitwise).
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from tsae.config import TrainConfig
from tsae.errors import UserError
from tsae.rundir import layout
from tsae.utils.atomic import write_json
from tsae.utils.config_json import load_json, to_dict
from tsae.utils.nested import flatten


class Tracker(Protocol):
    """A destination of the measurements of a run."""

    def write(self, values: dict[str, float]) -> None:
        """Log the measurements of a step; ``values`` includes `step`."""

    def evaluation(self, metrics: dict[str, Any], step: int) -> None:
        """Log the content of eval.json, after ``step`` steps."""

    def close(self) -> None:
        """Finish."""


def check_trackers(names: Iterable[str]) -> None:
    """Raise `UserError`, with what to do, unless each tracker can be used."""
    names = list(dict.fromkeys(names))
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"--log {name} needs the package {name}, which is not installed; run pip install {name}.")
    if "wandb" in names and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        try:
            wandb.login()  # asks for a key on a terminal, now rather than in `open_trackers`
        except wandb.errors.Error as error:
            raise UserError(f"--log wandb: {_sentence(error)} Or set WANDB_MODE=offline.") from None


def open_trackers(directory: Path, cfg: TrainConfig, step: int) -> list[Tracker]:
    """The trackers of a run that has completed ``step`` steps.

    Raises:
        UserError: Weights & Biases does not start.
    """
    kinds: dict[str, Callable[[Path, TrainConfig, int], Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb}
    return [kinds[name](directory, cfg, step) for name in dict.fromkeys(cfg.log)]


def track_evaluation(directory: Path, cfg: TrainConfig, step: int, metrics: dict[str, Any]) -> None:
    """Log the content of an eval.json to the trackers of a run that has completed ``step`` steps."""
    for tracker in open_trackers(directory, cfg, step):
        tracker.evaluation(metrics, step)
        tracker.close()


class TensorBoard:
    """Event files in `tensorboard/`."""

    def __init__(self, directory: Path, cfg: TrainConfig, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # An earlier process may have logged steps after the checkpoint, which are repeated.
        self._writer = SummaryWriter(str(directory / layout.TENSORBOARD), purge_step=step + 1)

    def write(self, values: dict[str, float]) -> None:
        step = int(values["step"])
        for name, value in values.items():
            if name != "step":
                self._writer.add_scalar(f"train/{name}", value, step)
        self._writer.flush()  # a checkpoint must not be ahead of it

    def evaluation(self, metrics: dict[str, Any], step: int) -> None:
        for name, value in flatten(metrics, "/").items():
            self._writer.add_scalar(f"evaluation/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of the project `tsae`, or of WANDB_PROJECT; the runs of a sweep form a group."""

    def __init__(self, directory: Path, cfg: TrainConfig, step: int) -> None:
        import wandb

        place = directory / layout.WANDB_ID
        if not place.exists():
            write_json(place, {"id": secrets.token_hex(4)})
        whole = directory.resolve()
        group = whole.parent.name if (whole.parent / layout.SWEEP).exists() else None
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "tsae"),
                name=os.environ.get("WANDB_NAME", f"{group or cfg.preset}/{whole.name}"),
                group=group,
                id=load_json(place)["id"],
                resume="allow",
                config=to_dict(cfg),
                dir=str(directory),
                reinit="create_new",  # the runs of a sweep are open side by side
            )
        except wandb.errors.Error as error:
            raise UserError(f"--log wandb: {_sentence(error)} Or set WANDB_MODE=offline.") from None

    def write(self, values: dict[str, float]) -> None:
        named = {f"train/{name}": value for name, value in values.items() if name != "step"}
        self._run.log(named, step=int(values["step"]))

    def evaluation(self, metrics: dict[str, Any], step: int) -> None:
        self._run.summary.update({f"evaluation/{name}": value for name, value in flatten(metrics, "/").items()})

    def close(self) -> None:
        self._run.finish()


def _sentence(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".") + "."
