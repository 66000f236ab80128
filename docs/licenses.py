"""Writes docs/licenses.md: the licence of every package that refusion_jax needs at run time.

    python docs/licenses.py

`make licenses` runs it. Names, versions and licences come from the metadata of the installed packages.
"""

import re
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
HEADER = """\
# Licences of the dependencies

`make licenses` writes this page from the metadata of the installed packages. It lists the packages that
`pip install .` installs, without extras; the direct dependencies are those that `setup.py` names.

| package | version | licence | direct |
|---|---|---|---|
"""


Package = tuple[str, str]  # name, and an extra of it or ""


def needed(package: Package) -> Iterator[Package]:
    """The packages that an installed package requires in this environment."""
    name, extra = package
    for line in distribution(name).requires or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            required = re.sub(r"[-_.]+", "-", requirement.name).lower()
            yield from ((required, extra) for extra in ("", *requirement.extras))


def licence(name: str) -> str:
    """The licence that a package declares: its SPDX expression, else the text or the classifiers."""
    about = distribution(name).metadata
    if expression := about.get("License-Expression"):
        return expression
    classified = [
        value.rpartition(" :: ")[2]
        for value in about.get_all("Classifier", ())
        if value.startswith("License")
    ]
    text = (about.get("License") or "").strip().splitlines()
    return ", ".join(classified) or (text[0] if text else "not declared")


def main() -> None:
    direct = set(needed(("refusion_jax", "")))
    found, new = set(), direct
    while new:
        found |= new
        new = {after for before in new for after in needed(before)} - found
    rows = [
        (name, distribution(name).version, licence(name), "yes" if (name, "") in direct else "")
        for name in sorted({name for name, _ in found})
    ]
    lines = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    (ROOT / "docs" / "licenses.md").write_text(HEADER + lines, encoding="utf-8")


if __name__ == "__main__":
    main()
