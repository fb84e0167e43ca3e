"""Create an environment with the peers on top of this interpreter's: `python tests/peers/peers_environment.py DIR`.

It inherits every package of the environment below and adds the peers and their missing dependencies. So the peers are
tested with the same package versions as everything else, while the environment below stays free of them.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tomllib
import venv
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]
BELOW = "_below.pth"  # in the upper environment, points to the packages of the lower one
CONSTRAINTS = ROOT / "constraints.txt"
SINGLE_PROCESS = ROOT / "tests" / "peers" / "requirements.txt"


def packages_of(environment: Path) -> Path:
    """The package folder of an environment."""
    scheme = sysconfig.get_preferred_scheme("prefix")
    return Path(sysconfig.get_path("purelib", scheme, {"base": str(environment), "platbase": str(environment)}))


def below(packages: Path) -> Path:
    """The package folder of the lower environment, given that of the upper one.

    Raises:
        FileNotFoundError: the environment was not created by `make`.
    """
    return Path((packages / BELOW).read_text(encoding="utf-8").split('"')[1])


def versions(packages: Path) -> dict[str, str]:
    """Name -> version of the packages in a folder."""
    return {found.name.lower().replace("_", "-"): found.version for found in distributions(path=[str(packages)])}


def make(environment: Path) -> None:
    """Create the environment, replacing an existing one.

    Raises:
        subprocess.CalledProcessError: a package cannot be installed.
    """
    venv.create(environment, symlinks=True, clear=True)
    lower = sysconfig.get_path("purelib")
    # addsitedir also processes the lower environment's .pth files, which editable installs need.
    line = f'import site; site.addsitedir("{lower}")\n'
    (packages_of(environment) / BELOW).write_text(line, encoding="utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*pip, "--constraint", str(CONSTRAINTS), *extras["peers"]], check=True)
    subprocess.run([*pip, "--no-deps", "--requirement", str(SINGLE_PROCESS)], check=True)


if __name__ == "__main__":
    make(Path(sys.argv[1]).absolute())
