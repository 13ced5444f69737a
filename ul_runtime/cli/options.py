"""Options that several commands share, spelled once: fields of dataclasses that `with_options` makes options of."""

import dataclasses
import functools
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, get_type_hints

import typer

from ul_runtime.errors import UsageError, visible
from ul_runtime.machine import VERSION
from ul_runtime.settings import option

if TYPE_CHECKING:
    from ul_runtime.settings import Overrides


def with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """For typer: each parameter that is annotated with a dataclass becomes an option for each of its fields.

    The command is called with the dataclass made of them. Every command also gets --version.
    """
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {
        name: p.annotation for name, p in signature.parameters.items() if dataclasses.is_dataclass(p.annotation)
    }

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        given.pop("version")
        for name, group in groups.items():
            values = {field.name: given.pop(field.name) for field in dataclasses.fields(group)}
            given[name] = group(**{key: value for key, value in values.items() if value is not None})
        return command(**given)

    parameters = []
    for name, parameter in signature.parameters.items():
        expanded = _expanded(groups[name]) if name in groups else [parameter]
        parameters += [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in expanded]
    run.__signature__ = signature.replace(parameters=[*parameters, _VERSION])  # type: ignore[attr-defined]
    del run.__wrapped__  # or typer would read the command's own signature
    return run


def _expanded(group: type) -> list[inspect.Parameter]:
    hints, parameters = get_type_hints(group, include_extras=True), []
    for field in dataclasses.fields(group):
        words = dict(field.metadata["option"])
        names = words.pop("names") or (f"--{field.name.replace('_', '-')}",)
        default = field.default if field.default is not dataclasses.MISSING else None
        annotation: Any = Annotated.__class_getitem__((hints[field.name], typer.Option(*names, **words)))  # type: ignore[attr-defined]
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    return parameters


def _say_version(asked: bool) -> None:
    if asked:
        print(VERSION)
        raise typer.Exit


_VERSION = inspect.Parameter(
    "version",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Show the version and end.")
    ],
)

_BUNDLES = "the bundle's"
_SAMPLERS = "ddim, ancestral, dpmpp2m, ab2, ab3, sa2 or sa2:TAU (noise), unipc2, heun"
_GRIDS = "uniform, cosine, karras, flow, mix or mix:RHO,CENTRE,WIDTH"

_A_BUNDLE = "Bundle of ul-export (a folder), or a model inside the package: garments-32."
_BUNDLE = f"{_A_BUNDLE} With --backend torch a run."
_OUT = typer.Option("--out", metavar="DIR", help="Folder of the images: new, empty, or of the same job to go on.")
BundleArgument: TypeAlias = Annotated[Path, typer.Argument(metavar="BUNDLE", help=_BUNDLE)]
BundleAlone: TypeAlias = Annotated[Path, typer.Argument(metavar="BUNDLE", help=_A_BUNDLE)]
OptionalBundle: TypeAlias = Annotated[
    Path | None, typer.Argument(metavar="BUNDLE", help=_BUNDLE, show_default="garments-32")
]
OutFolder: TypeAlias = Annotated[Path, _OUT]
OptionalOutFolder: TypeAlias = Annotated[Path | None, _OUT]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print the result as one JSON line.")]


@dataclass(frozen=True)
class JobOptions:
    """Of every command that fills a folder or a file."""

    seed: int = option(0, "Seed of all noise.", metavar="INT")
    batch_size: int | None = option(
        None,
        "Batch size. Does not change the images (on a GPU: last digits).",
        metavar="IMAGES",
        shown="by size; 64 on a GPU",
    )


@dataclass(frozen=True)
class PriorOptions:
    """How the prior is sampled, over the bundle's settings."""

    steps: int | None = option(
        None, "Prior steps: one network call each, two with heun.", metavar="COUNT", shown=_BUNDLES
    )
    sampler: str | None = option(None, f"Sampler of the prior: {_SAMPLERS}.", metavar="NAME", shown=_BUNDLES)
    grid: str | None = option(None, f"Time grid of the prior: {_GRIDS}.", metavar="NAME", shown=_BUNDLES)
    guidance: float | None = option(
        None, "Guidance weight: classifier-free, or by --guide; 1 is off.", metavar="WEIGHT", shown=_BUNDLES
    )
    guidance_interval: str | None = option(
        None, "Guide only where logsnr is in this interval, or all.", metavar="LO,HI", shown=_BUNDLES
    )
    guidance_rescale: float | None = option(
        None, "Guidance rescale phi in [0, 1] (Lin et al. 2023); 0 is off.", metavar="PHI", shown=_BUNDLES
    )


@dataclass(frozen=True)
class DecoderOptions:
    """How the decoder is sampled, over the bundle's settings."""

    preset: str | None = option(
        None, "Settings of the bundle by name, such as draft; none: without students.", metavar="NAME", shown=_BUNDLES
    )
    student: list[str] = option(
        [], "Sample by this student of the bundle, as it was trained; repeatable.", metavar="NAME", shown="the preset's"
    )
    decoder_steps: int | None = option(
        None, "Decoder steps: one network call each, two with heun.", metavar="COUNT", shown=_BUNDLES
    )
    decoder_sampler: str | None = option(None, f"Sampler of the decoder: {_SAMPLERS}.", metavar="NAME", shown=_BUNDLES)
    decoder_grid: str | None = option(None, f"Time grid of the decoder: {_GRIDS}.", metavar="NAME", shown=_BUNDLES)

    @property
    def overrides(self) -> "Overrides":
        """As Pipeline.generate and Pipeline.decode take them."""
        given: Any = dataclasses.asdict(self)
        students = given.pop("student")
        return {**given, "students": students or None}


@dataclass(frozen=True)
class SamplingOptions(DecoderOptions, PriorOptions):
    """Both; the prior's come first."""

    @property
    def overrides(self) -> "Overrides":
        """As Pipeline.generate takes them. UsageError."""
        return {**super().overrides, "guidance_interval": parse_interval(self.guidance_interval)}


def print_table(*parts: Any, width: int | None = None) -> None:
    """Tables and lines of rich on stdout, `width` columns wide where no terminal says it. Names in them are text alone:
    neither markup nor what a terminal would obey. A pipe that is closed raises BrokenPipeError, as print does.
    """
    from rich.console import Console
    from rich.text import Text

    class Plain(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            lines = [visible(line) for line in text.split("\n")]
            return super().render_str("\n".join(lines), **options | {"markup": False, "emoji": False})

    console = Plain(width=None if sys.stdout.isatty() else width)
    with console.capture() as shown:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, str), highlight=False)
    print(shown.get(), end="")


def print_figures(figures: dict[str, Any], as_json: bool) -> None:
    """A result on stdout: one JSON line, or a line for each figure."""
    if as_json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(visible(f"{name:>24}  {f'{value:.4g}' if isinstance(value, float) else value}"))


def parse_interval(text: str | None) -> tuple[float, float] | None:
    """`LO,HI` or `all` as two numbers; UsageError."""
    if text is None:
        return None
    if text == "all":
        return (float("-inf"), float("inf"))
    try:
        low, high = (float(end) for end in text.split(","))
    except ValueError:
        raise UsageError(f"--guidance-interval {text!r}: expected LO,HI in logsnr such as -3,1.5, or all") from None
    return low, high
