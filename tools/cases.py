"""Writes docs/cases.md: trouble that users and attackers met, what happens now, and the test of it.

The rows are the markers `case` of the tests; cases without a test are answered here, with the reason.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "cases.md"
HEAD = """\
# Cases: what happens when something goes wrong?

Each row is trouble that users met here or elsewhere, or that attackers tried: F and R images, data and names, A hostile
files, threads and signals, N a first day, the others crashes and faults that were injected. `tools/cases.py` writes
this page from the tests.

"""
ANSWERS: dict[str, tuple[str, str]] = {}  # case -> (what was tried, why nothing was changed)


Test: TypeAlias = tuple[str, str]  # file, function
Row: TypeAlias = tuple[str, str, str]  # case, what was tried, what happens now


def marks(file: Path) -> Iterator[tuple[str, list[str]]]:
    """(test function, arguments) of each marker in a file."""
    for function in ast.parse(file.read_text()).body:
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.case":
                    yield function.name, [ast.literal_eval(argument) for argument in node.args]


def rows(files: list[Path]) -> dict[Row, list[Test]]:
    """All rows and their tests, in the order of the cases. ValueError: a case that no marker describes."""
    found: dict[Row, list[Test]] = {(name, *answer): [] for name, answer in ANSWERS.items()}
    further: list[tuple[str, Test]] = []
    for file in files:
        for function, (name, *words) in marks(file):
            if words:
                found.setdefault((name, *words), []).append((file.name, function))
            else:
                further.append((name, (file.name, function)))
    for name, test in further:
        of_name = [tests for row, tests in found.items() if row[0] == name]
        if not of_name:
            raise ValueError(f"{test[0]}: no marker says what was tried in case {name} and what happens now")
        if test not in of_name[0]:
            of_name[0].append(test)
    return dict(sorted(found.items(), key=lambda item: _order(item[0][0])))


def test_files() -> list[Path]:
    """All that are read."""
    return sorted((ROOT / "tests").glob("test_*.py"))


def _order(name: str) -> tuple[str, int]:
    letters, digits = re.fullmatch(r"([A-Z]+)(\d+)", name).groups()  # type: ignore[union-attr]
    return letters, int(digits)


def page(found: dict[Row, list[Test]]) -> str:
    """The table as Markdown."""
    lines = ["| case | tried | what happens now | test |", "|---|---|---|---|"]
    for (name, tried, now), tests in found.items():
        links = "<br>".join(f"[{function}](../tests/{file})" for file, function in tests) or "none"
        lines.append(f"| {name} | {_cell(tried)} | {_cell(now)} | {links} |")
    return HEAD + "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(rows(test_files())))


if __name__ == "__main__":
    main()
