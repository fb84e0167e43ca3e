"""Runs of the main job in the processes of one torchrun, one after another: python -m torch.distributed.run job.py FILE.

FILE holds a JSON list of command lines of `tsae.train`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from tsae.train import main

if __name__ == "__main__":
    dist.init_process_group("gloo")
    for argv in json.loads(Path(sys.argv[1]).read_text()):
        if code := main(argv):
            raise SystemExit(f"{argv}: status {code}")
    dist.destroy_process_group()
