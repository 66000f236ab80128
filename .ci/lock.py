"""Writes requirements-X.Y.txt for the Python that runs this, from a report of pip on stdin.

    python -m pip install --quiet --dry-run --report=- '.[dev]' | python .ci/lock.py

`make lock` runs it. The file pins every package of `.[dev]`, the transitive ones included.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEADER = """\
# Every package that `make` and CI install with Python {version}, resolved on Linux x86-64.
# Renewed by: make PYTHON=python{version} lock
"""


def main() -> None:
    found = [package["metadata"] for package in json.load(sys.stdin)["install"]]
    pins = {package["name"].lower().replace("_", "-"): package["version"] for package in found}
    del pins["refusion-jax"]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    lines = "".join(f"{name}=={pins[name]}\n" for name in sorted(pins))
    (ROOT / f"requirements-{version}.txt").write_text(HEADER.format(version=version) + lines)


if __name__ == "__main__":
    main()
