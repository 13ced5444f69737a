"""Options that several commands share, spelled once: fields of dataclasses that `with_options` makes options of."""

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, get_type_hints

import typer

from ul_runtime.errors import UsageError
from ul_runtime.machine import VERSION
from ul_runtime.machine import MachineOptions as MachineOptions
from ul_runtime.option import option as option

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
BundleArgument: TypeAlias = Annotated[Path, typer.Argument(metavar="BUNDLE", help=_BUNDLE)]
BundleAlone: TypeAlias = Annotated[Path, typer.Argument(metavar="BUNDLE", help=_A_BUNDLE)]
OptionalBundle: TypeAlias = Annotated[
    Path | None, typer.Argument(metavar="BUNDLE", help=_BUNDLE, show_default="garments-32")
]
_OUT = typer.Option("--out", metavar="DIR", help="Folder of the images: new, empty, or of the same job to go on.")
OutFolder: TypeAlias = Annotated[Path, _OUT]
OptionalOutFolder: TypeAlias = Annotated[Path | None, _OUT]
Labels: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--label",
        metavar="NAME|INT|none",
        help="Class of the images; repeat it for several in turn.",
        show_default="all classes in turn",
    ),
]
Replay: TypeAlias = Annotated[
    Path | None,
    typer.Option("--replay", metavar="IMAGE", help="Make this PNG of ul-generate again; exit code 1 if not equal."),
]
Seed: TypeAlias = Annotated[int, typer.Option("--seed", metavar="INT", help="Seed of all noise.")]
BatchSize: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        metavar="IMAGES",
        help="Images at a time; no effect on them, but for last digits on an NVIDIA card.",
        show_default="by size; 64 on a card",
    ),
]
Threads: TypeAlias = Annotated[
    int | None, typer.Option("--threads", metavar="COUNT", help="CPU threads.", show_default="one per core")
]
Spinning: TypeAlias = Annotated[
    bool,
    typer.Option("--spinning/--no-spinning", help="Threads wait busily (ort-cpu): faster, rude on a shared machine."),
]
BackendName: TypeAlias = Annotated[
    str,
    typer.Option("--backend", metavar="auto|ort-cpu|openvino|tensorrt|ort-cuda|torch", help="What runs the graphs."),
]
Devices: TypeAlias = Annotated[
    str | None,
    typer.Option("--devices", metavar="N,...", help="NVIDIA cards by number, at work together.", show_default="0"),
]
OneDevice: TypeAlias = Annotated[
    str | None, typer.Option("--devices", metavar="N", help="An NVIDIA card by its number.", show_default="0")
]
EngineFolder: TypeAlias = Annotated[
    Path | None,
    typer.Option("--engines", metavar="DIR", help="Where TensorRT engines are kept.", show_default="the user's cache"),
]
RequireGraphs: TypeAlias = Annotated[
    bool, typer.Option("--require-graphs", help="Fail where a step cannot be captured as a CUDA graph.")
]
Precision: TypeAlias = Annotated[
    str | None,
    typer.Option("--precision", metavar="fp32|bf16", help="What the networks compute in.", show_default=_BUNDLES),
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print the result as one JSON line.")]
DecoderSteps: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--decoder-steps",
        metavar="COUNT",
        help="Decoder steps: a call of the network each, two of heun.",
        show_default=_BUNDLES,
    ),
]
DecoderSampler: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--decoder-sampler", metavar="NAME", help=f"Sampler of the decoder: {_SAMPLERS}.", show_default=_BUNDLES
    ),
]
DecoderGrid: TypeAlias = Annotated[
    str | None,
    typer.Option("--decoder-grid", metavar="NAME", help=f"Time grid of the decoder: {_GRIDS}.", show_default=_BUNDLES),
]
Steps: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--steps", metavar="COUNT", help="Prior steps: a call of the network each, two of heun.", show_default=_BUNDLES
    ),
]
Sampler: TypeAlias = Annotated[
    str | None,
    typer.Option("--sampler", metavar="NAME", help=f"Sampler of the prior: {_SAMPLERS}.", show_default=_BUNDLES),
]
Grid: TypeAlias = Annotated[
    str | None,
    typer.Option("--grid", metavar="NAME", help=f"Time grid of the prior: {_GRIDS}.", show_default=_BUNDLES),
]
Guidance: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--guidance", metavar="WEIGHT", help="Guidance: classifier-free, or by --guide; 1 = off.", show_default=_BUNDLES
    ),
]
GuideBundle: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--guide",
        metavar="BUNDLE",
        help="A lesser prior of the same latents: guidance leads away from it.",
        show_default="no label",
    ),
]
GuidanceInterval: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--guidance-interval", metavar="LO,HI", help="Guide where logsnr is in it; or all.", show_default=_BUNDLES
    ),
]
GuidanceRescale: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--guidance-rescale",
        metavar="PHI",
        help="Share (0 to 1) by which guided predictions get back the standard deviation of unguided ones.",
        show_default=_BUNDLES,
    ),
]


@dataclass(frozen=True)
class SamplingOptions:
    """Sampler settings over those of the bundle."""

    steps: int | None = option(
        None, "Prior steps: a call of the network each, two of heun.", metavar="COUNT", shown=_BUNDLES
    )
    sampler: str | None = option(None, f"Sampler of the prior: {_SAMPLERS}.", metavar="NAME", shown=_BUNDLES)
    grid: str | None = option(None, f"Time grid of the prior: {_GRIDS}.", metavar="NAME", shown=_BUNDLES)
    guidance: float | None = option(
        None, "Guidance: classifier-free, or by --guide; 1 = off.", metavar="WEIGHT", shown=_BUNDLES
    )
    guidance_interval: str | None = option(
        None, "Guide where logsnr is in it; or all.", metavar="LO,HI", shown=_BUNDLES
    )
    guidance_rescale: float | None = option(
        None, "Guidance rescale phi in [0, 1] (Lin et al. 2023); 0 is off.", metavar="PHI", shown=_BUNDLES
    )
    decoder_steps: int | None = option(
        None, "Decoder steps: a call of the network each, two of heun.", metavar="COUNT", shown=_BUNDLES
    )
    decoder_sampler: str | None = option(None, f"Sampler of the decoder: {_SAMPLERS}.", metavar="NAME", shown=_BUNDLES)
    decoder_grid: str | None = option(None, f"Time grid of the decoder: {_GRIDS}.", metavar="NAME", shown=_BUNDLES)

    @property
    def overrides(self) -> "Overrides":
        """As Pipeline.generate takes them. UsageError."""
        given: Any = dataclasses.asdict(self) | {"guidance_interval": parse_interval(self.guidance_interval)}
        return given


def print_figures(figures: dict[str, Any], as_json: bool) -> None:
    """A result on stdout: one JSON line, or a line for each figure."""
    if as_json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:>24}  {f'{value:.4g}' if isinstance(value, float) else value}")


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


def parse_devices(text: str | None) -> list[int]:
    """`0,1` as different numbers, none if not given; UsageError."""
    words = text.split(",") if text is not None else []
    if not all(word.strip().isdecimal() for word in words) or len({int(word) for word in words}) != len(words):
        raise UsageError(f"--devices {text!r}: expected different numbers of NVIDIA cards such as 0,1; see ul-doctor")
    return [int(word) for word in words]


def one_card(devices: str | None, engines: Path | None) -> dict[str, Any]:
    """What ul_runtime.loading.load takes of a card, for a command that works on one. UsageError."""
    cards = parse_devices(devices)
    if len(cards) > 1:
        raise UsageError(f"--devices {devices}: one card is expected; ul-generate alone works on several")
    return {"device": cards[0] if cards else None, "engines": engines}
