"""Writes docs/cases.md: trouble that users and attackers met, what happens now, and the test of it.

The rows are the markers `case` of the tests; cases without a test are answered here, with the reason.
"""

# ruff: noqa: E501

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


Test: TypeAlias = tuple[str, str]  # file, function
Row: TypeAlias = tuple[str, str, str]  # case, what was tried, what happens now


# fmt: off
ANSWERS: tuple[Row, ...] = (  # nothing was changed, and why
    ("A2", "unforeseen errors in the extra processes of --devices 0,1", "the traceback is multiprocessing's own; the command itself ends with one line and 70; not mended, for no machine with two GPUs was at hand"),
    ("A4", "RunOptions.terminate of ONNX Runtime, to stop within a call", "not used: a thread ends the process on the second signal or after 20 seconds, for every library alike; files are whole or absent"),
    ("A4", "a second signal while the command is already ending (after its last line)", "the process ends as killed by that signal (143), not with 75: Python's handlers are back at their defaults there, which is what ends it even if a library hangs"),
    ("A10", "a config.toml that asks for networks larger than memory", "the latent's channels are bounded as in a manifest; widths are the user's choice, torch's allocator refuses what does not fit"),
    ("A12", "memory that a graph takes between its inputs and outputs", "it cannot be known without running it; operators that make arrays of any size are refused, and the docs name ulimit and containers"),
    ("A16", "engines in a folder below a parent that everybody may write to", "accepted if the folder itself is the user's alone: no way in was found"),
    ("A16", "ul-eval with ASCII stdout", "needs no check before the work: what stdout has no character for is printed as an escape"),
    ("B5", "mutated ONNX in a child process", "graphs are held against a list of operators and the manifest before an engine sees them; engines stay in the process, because handing weights and images to a child would cost more than the remaining risk"),
    ("F7", "nclx colours of AVIF and HEIC (BT.2020, PQ) without a profile", "not looked at, as Pillow does not pass them on; such pictures are taken for sRGB, which docs/data.md says"),
    ("F15", "torch or another library calls std::terminate when memory is short (ulimit -v 600000)", "the process is aborted by the library (134); no code of ours runs then"),
    ("N11", "the time left of the whole run", "how long a step of the next stage takes is not known before it begins; --dry-run measures it, and the line says of which stage the time is"),
    ("N11", "a bundle's file prior.safetensors holds the network base", "the file is named for its place in sampling, where base stands for the prior (glossary); another name would be another bundle format"),
    ("N12", "ul-decode: originals beside the reconstructions", "a file of latents may come from anybody, and would choose which files of this machine are read; RUN/report.png has originals beside reconstructions"),
    ("N12", "files of ul-decode are called 000000.png though latents hold names", "names may repeat or hold folders, and a job continues by number; the contact sheet and the file of latents say the names in the same order"),
    ("N18", "samples are bad: what now?", "done in docs, not in code: docs/bad-pictures.md says which figure points to base, decoder, rate or data, and what to change"),
    ("R2", "TGA files", "not read, as TGA has no signature and damaged files would pass for pictures; each is rejected as unsupported"),
    ("R2", "TIFF of float RGB, float16, float64, big-endian uint32", "not read, as Pillow has no decoder for them and a TIFF library would be a new dependency; each is rejected as unsupported with its type"),
    ("R18", "progressive JPEG above 178,956,970 pixels", "still refused, as libjpeg keeps every coefficient of them in memory whatever the scale"),
    ("R19", "redirecting stderr while pictures are decoded", "not done, as it would hide other threads' output; libtiff's two handlers are switched off instead"),
)
# fmt: on


def marks(file: Path) -> Iterator[tuple[str, list[str]]]:
    """(test function, arguments) of each marker in a file."""
    for function in ast.parse(file.read_text()).body:
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.case":
                    yield function.name, [ast.literal_eval(argument) for argument in node.args]


def rows(files: list[Path]) -> dict[Row, list[Test]]:
    """All rows and their tests, in the order of the cases. ValueError: a case that no marker describes."""
    found: dict[Row, list[Test]] = {row: [] for row in ANSWERS}
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
