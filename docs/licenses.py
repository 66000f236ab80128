"""Prints the licences of the packages that `pip install .` brings, direct and indirect, as Markdown.

make licenses
"""

import re
from importlib import metadata

from packaging.requirements import Requirement

PACKAGE = "refusion_jax"


def needed(name: str, extras: frozenset[str] = frozenset()) -> set[tuple[str, frozenset[str]]]:
    """(package, its extras) that a package requires in this environment."""
    found = set()
    for line in metadata.requires(name) or ():
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in (extras or {""})):
            found.add((requirement.name, frozenset(requirement.extras)))
    return found


def closure() -> tuple[set[str], set[str]]:
    """Names of the direct requirements and of all, normalised."""
    direct = {normal(name) for name, _ in needed(PACKAGE)}
    seen: set[tuple[str, frozenset[str]]] = set()
    new = needed(PACKAGE)
    while new:
        seen |= new
        new = {after for name, extras in new for after in needed(name, extras)} - seen
    return direct, {normal(name) for name, _ in seen}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def licence(name: str) -> str:
    """As the package states it: the SPDX expression, the classifiers, or the first line of the text."""
    about = metadata.metadata(name)
    if about["License-Expression"]:
        return about["License-Expression"]
    classifiers = [
        c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or () if c.startswith("License ::")
    ]
    text = (about["License"] or "").strip().splitlines()
    return ", ".join(classifiers) or (text[0] if text else "not stated")


if __name__ == "__main__":
    direct, every = closure()
    print("# Licences of the dependencies\n")
    print("By `make licenses`: the packages that `pip install .` brings. Direct requirements are in bold.\n")
    print("| package | licence |\n| --- | --- |")
    for name in sorted(every):
        print(f"| {f'**{name}**' if name in direct else name} | {licence(name)} |")
