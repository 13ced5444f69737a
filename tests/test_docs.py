"""README and docs: examples run, relative links lead somewhere, every command is in the README's table."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`[^`\n]+`")


def python_blocks(page: Path) -> list[str]:
    return [text for language, text in _FENCE.findall(page.read_text()) if language == "python"]


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> Iterator[str]:
    """Relative links of a page whose file or heading is not there."""
    for link in _LINK.findall(_CODE.sub("", _FENCE.sub("", page.read_text()))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


@pytest.mark.parametrize("name", ["README.md", "docs/python.md"])
def test_the_python_examples_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(ROOT / name)
    assert blocks
    namespace: dict[str, object] = {}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{name}, example {number}", "exec"), namespace)
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_a_file_and_a_heading(page):
    assert list(broken_links(page)) == []


def test_a_link_to_no_file_and_to_no_heading_is_found(tmp_path):
    """The control of the test above."""
    page = tmp_path / "page.md"
    page.write_text(
        "# One heading: `x`, twice?\n[a](page.md) [b](#one-heading-x-twice) [c](nowhere.md) [d](page.md#no) "
        "![e](no.png) [f](https://example.org) `[g](code.md)`\n```\n[h](code.md)\n```\n"
    )
    assert list(broken_links(page)) == ["nowhere.md", "page.md#no", "no.png"]


def test_every_page_of_docs_is_linked_from_an_index():
    for index in (ROOT / "docs" / "index.md", ROOT / "docs" / "results" / "index.md"):
        linked = set(_LINK.findall(index.read_text()))
        pages = {page.name for page in index.parent.glob("*.md")} - {index.name}
        assert pages <= linked, f"{index}: {pages - linked}"


def test_the_readme_takes_two_screens():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120


def test_every_command_is_in_the_table_of_the_readme():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    rows = re.findall(r"^\| `(ul-[a-z]+)[ `]", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert set(project["scripts"]) == set(rows)
