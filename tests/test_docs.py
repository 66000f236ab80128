"""The pages of docs/, README.md and CONTRIBUTING.md: links resolve, and what is drawn comes from its data."""

import ast
import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]


def text_of(page: Path) -> str:
    """A page without its fenced blocks, whose contents are no Markdown."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if page.name.endswith("text.md"):  # rendered into docs/comparison.md, and its links are that page's
            linked = (ROOT / "docs" / path).resolve() if path else ROOT / "docs" / "comparison.md"
        assert linked.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name}: {target}"


def test_every_page_of_docs_is_listed_once():
    listed = re.findall(r"^- \[.+?\]\((\w+\.md)\)", text_of(ROOT / "docs" / "README.md"), flags=re.MULTILINE)
    there = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert sorted(listed) == sorted(there)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    """Paths of the repository in backticks; a part in capitals is a placeholder."""
    folders = r"(?:refusion_jax|docs|tests|configs|launch)"
    for path in re.findall(rf"`({folders}/[\w./]*\w)`", text_of(page)):
        assert (ROOT / path).exists() or re.search("[A-Z]{4}", path), f"{page.name}: {path}"


def defined(path: Path) -> set[str]:
    """Names of the functions and classes in a file, nested ones included."""
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


def test_the_functions_that_architecture_names_exist():
    named = re.findall(r"`([\w/]+\.py):(\w+)`", text_of(ROOT / "docs" / "architecture.md"))
    assert len(named) > 30
    for path, name in named:
        assert name in defined(ROOT / "refusion_jax" / path), f"{path}:{name}"


def test_the_picture_is_drawn_from_its_trace():
    trace = json.loads((ROOT / "docs" / "decode_trace.json").read_text(encoding="utf-8"))
    render = runpy.run_path(str(ROOT / "docs" / "picture.py"))["render"]
    assert render(trace) == (ROOT / "docs" / "decode.svg").read_text(encoding="utf-8")
