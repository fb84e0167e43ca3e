"""Random kills of real runs; see kill_campaign.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def campaign(kills: int, directory: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    seed = os.environ.get("TSAE_KILL_SEED", "0")
    command = [sys.executable, str(Path(__file__).parents[1] / "helpers" / "kill_campaign.py")]
    done = subprocess.run(
        [*command, "--kills", str(kills), "--seed", seed, "--directory", str(directory)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills, seed {seed}: every restart completed, with the same weights" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_runs_killed_at_random_moments_end_with_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the demo extra is not installed")
    campaign(50, tmp_path)
