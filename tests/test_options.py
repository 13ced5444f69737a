"""Options as dataclasses: with_options makes options of the fields, and dataclasses of what is given."""

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from command import Runner
from rich.table import Table

from ul_runtime.cli.command import run_command
from ul_runtime.cli.options import SamplingOptions, print_figures, print_table, with_options
from ul_runtime.errors import UsageError
from ul_runtime.machine import VERSION, MachineOptions, OneGpuOptions
from ul_runtime.settings import option

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Cake:
    layers: int = option(3, "How many layers.", "--layers", "-l", metavar="COUNT")
    icing: bool = option(True, "With icing.", "--icing/--no-icing")
    fruits: list[str] = option([], "Fruits.", metavar="NAME", shown="none at all")
    folder: Path | None = option(None, "Where it is kept.", metavar="DIR")


@dataclass(frozen=True)
class Baker:
    name: str = option(..., "Who bakes.", metavar="NAME")

    def __post_init__(self) -> None:
        if self.name == "nobody":
            raise UsageError("nobody cannot bake")


def bake(command: Runner, *arguments: Any) -> tuple[Any, ...]:
    """What the command is called with."""
    called: list[tuple[Any, ...]] = []
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

    @app.command(epilog="Example: bake")
    @with_options
    def main(where: Annotated[str, typer.Argument()], cake: Cake, baker: Baker, quick: bool = False) -> None:
        called.append((where, cake, baker, quick))

    result = command(lambda: run_command(app, "bake"), *arguments)
    called.append((result,))
    return called[0]


def test_what_is_not_given_is_as_the_dataclass_says(command: Runner) -> None:
    assert bake(command, "here", "--name", "Ada") == ("here", Cake(), Baker("Ada"), False)


def test_what_is_given_reaches_its_field(command: Runner) -> None:
    words = ("-l", 5, "--no-icing", "--fruits", "plum", "--fruits", "fig", "--folder", "shelf", "--name", "Ada")
    expected = Cake(5, False, ["plum", "fig"], Path("shelf"))
    assert bake(command, "here", *words, "--quick") == ("here", expected, Baker("Ada"), True)


def test_help_shows_every_field_with_its_default(command: Runner) -> None:
    (result,) = bake(command, "--help")
    assert result.code == 0
    for text in ("-l, --layers COUNT", "[default: 3]", "--icing / --no-icing", "(none at all)", "--folder DIR"):
        assert text in result.out
    assert re.search(r"--name NAME +Who bakes\. +\[required\]", result.out)


def test_a_missing_option_a_wrong_type_and_a_refused_value_are_one_line(command: Runner) -> None:
    for words, message in (
        (("here",), "Missing option '--name'"),
        (("here", "--name", "Ada", "--layers", "many"), "Invalid value for '--layers' / '-l'"),
        (("here", "--name", "nobody"), "nobody cannot bake"),
    ):
        (result,) = bake(command, *words)
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
        assert message in result.err


@pytest.mark.parametrize("words", [("--version",), ("here", "--version"), ("--version", "--layers", "5")])
def test_the_version_is_printed_whatever_else_is_given(command: Runner, words: tuple[str, ...]) -> None:
    (result,) = bake(command, *words)
    assert (result.code, result.out, result.err) == (0, f"{VERSION}\n", "")


def test_sampling_options_become_overrides_of_every_setting() -> None:
    assert {name for name, value in SamplingOptions().overrides.items() if value is not None} == set()
    given = SamplingOptions(steps=3, guidance_interval="-inf,1.5", decoder_grid="mix", student=["prior-4"])
    fields_given = asdict(given)
    students = fields_given.pop("student")
    assert given.overrides == fields_given | {"guidance_interval": (float("-inf"), 1.5), "students": students}
    assert [field.name for field in fields(SamplingOptions)][:2] == ["steps", "sampler"]
    with pytest.raises(UsageError, match="expected LO,HI"):
        _ = SamplingOptions(guidance_interval="3").overrides


@pytest.mark.parametrize("text", ["", "a", "0,", "0,0", "-1", "1.5"])
def test_devices_are_different_numbers(text: str) -> None:
    with pytest.raises(UsageError, match="expected different GPU indices"):
        MachineOptions(devices=text)


def test_a_command_on_one_gpu_takes_one() -> None:
    assert MachineOptions(devices="0,1").gpus == [0, 1]
    assert OneGpuOptions(devices="1").gpus == [1]
    with pytest.raises(UsageError, match="one GPU is expected"):
        OneGpuOptions(devices="0,1")


@pytest.mark.case(
    "A7", "markup such as [red] or [/x] in a bundle's, a recipe's or a source's name", "shown as it is, in every table"
)
@pytest.mark.parametrize("name", ["x[/nosuch]", "[red]x", ":smile:", "[link=https://host]x"])
def test_markup_in_a_name_is_shown_as_it_is(capsys: pytest.CaptureFixture[str], name: str) -> None:
    table = Table(name, title=name)
    table.add_row(name)
    print_table(table, name, width=200)
    assert capsys.readouterr().out.count(name) == 4


@pytest.mark.case("A8")
def test_what_a_terminal_would_obey_is_shown_in_tables_and_figures(capsys: pytest.CaptureFixture[str]) -> None:
    name = "x\x1b]0;owned\x07"
    print_table(Table(name, title=name), name, width=200)
    print_figures({"run": name}, as_json=False)
    out = capsys.readouterr().out
    assert out.count(r"x\x1b]0;owned\x07") == 4
    assert "\x1b" not in out


@pytest.mark.case("A7")
def test_no_other_line_shows_tables_or_the_names_of_progress_bars() -> None:
    lines = [line for path in ROOT.glob("ul_*/**/*.py") for line in path.read_text().splitlines()]
    columns = [line for line in lines if 'TextColumn("{task.description}"' in line]
    assert len(columns) == 2
    assert all("markup=False" in line for line in columns)
    consoles = [line.strip() for line in lines if re.search(r"\b(Console|Plain)\(", line) and "class " not in line]
    assert len(consoles) == 3
    assert sum("Console(stderr=True)" in line for line in consoles) == 2
