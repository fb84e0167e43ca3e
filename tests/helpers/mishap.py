"""A run of the main job in which process 1 fails before step 4:

python -m torch.distributed.run --nproc-per-node 2 tests/helpers/mishap.py MISHAP ARGUMENTS OF tsae.train
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from tsae.train import main
from tsae.training.trainer import Trainer


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def error() -> None:
    raise ArithmeticError("a mishap")


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def before_step_4(mishap: str) -> None:
    real = Trainer.train_step

    def train_step(self: Trainer, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.step == 3 and os.environ["RANK"] == "1":
            {"kill": kill, "error": error, "interrupt": interrupt}[mishap]()
        return real(self, *args, **kwargs)

    Trainer.train_step = train_step  # type: ignore[method-assign]


if __name__ == "__main__":
    before_step_4(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
