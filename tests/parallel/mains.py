"""Runs of the main job one after another, in one process or in those of one torchrun:

    python -m torch.distributed.run --nproc-per-node N tests/parallel/mains.py FILE

FILE holds a JSON list of [exit status, command line of tsae.train].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tsae.parallel.processes import processes
from tsae.train import main

if __name__ == "__main__":
    with processes(timeout=240):
        for expected, argv in json.loads(Path(sys.argv[1]).read_text()):
            status = main(argv)
            if status != expected:
                raise RuntimeError(f"{argv}: status {status}")
