"""manifest.json of a bundle: the one description of the file format, and a parser that fears nothing.

Shapes are those of the step graphs: `b` (batch) and `g` (guidance branches) dynamic, float32 at the boundary.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    FiniteFloat,
    JsonValue,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from ul_runtime.errors import CONTROLS, BadInputError, UntrustedError, UsageError
from ul_runtime.samplers import parse_grid, parse_sampler

FORMAT: Final = "unified-latents-bundle"
FORMAT_VERSION: Final = 4  # 3 had neither students nor presets
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 2**20
MAX_DEPTH = 16
MAX_FILES = 64
MAX_KEYS = 4096
MAX_NAME = 128  # characters
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
ROW_SIZE = 8
HISTORY = 2
# Formats that run code when opened: never in a bundle, whatever the manifest says.
CODE_SUFFIXES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".engine", ".plan", ".so", ".py")

GraphName: TypeAlias = str  # of GRAPH_NAMES, or a student, which is another network in the place of one
StepName = Literal["prior_step", "decoder_step"]
NETWORK_GRAPHS: tuple[GraphName, ...] = ("encoder", "prior_step", "decoder_step")
GRAPH_NAMES: tuple[GraphName, ...] = (*NETWORK_GRAPHS, "pixels")
Shape = tuple[int | str, ...]
_MOST_VALUES = 2**26  # of an image or a latent: 8192 x 8192

Text = Annotated[str, Field(min_length=1, max_length=MAX_NAME, pattern=f"^[^{CONTROLS}]+$")]  # safe to print
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1, le=65536)]
StudentName = Annotated[str, Field(pattern=r"^(prior|decoder)-[1-9][0-9]{0,3}$")]  # network, calls
Dimension = Count | Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,31}$")]


def _taken_by(parse: Callable[[str], object]) -> AfterValidator:
    """Only text that `parse` takes; its UsageError becomes the ValueError that pydantic knows."""

    def check(text: str) -> str:
        try:
            parse(text)
        except UsageError as error:
            raise ValueError(error) from None
        return text

    return AfterValidator(check)


def check_file_name(name: str, where: str) -> None:
    """Refuse a name that could leave the bundle or run code (UntrustedError) or that is malformed (BadInputError)."""
    if re.search(r"[/\\\0:]", name) or name.startswith(".."):
        raise UntrustedError(f"{where}: file name {name[:200]!a} leaves the bundle; do not use this bundle")
    if not FILE_NAME.fullmatch(name):
        raise BadInputError(f"{where}: file name {name[:200]!a}; expected letters, digits, '.', '_', '-', at most 128")
    if name.lower().endswith(CODE_SUFFIXES):
        raise UntrustedError(
            f"{where}: {name} is of a kind that can run code; a bundle holds onnx and safetensors only"
        )


def _where(info: ValidationInfo) -> str:
    """The file that is parsed, for errors that are raised as they are: pydantic turns ValueError alone into its own."""
    return str(info.context or MANIFEST_NAME)


def _is_file_name(name: str, info: ValidationInfo) -> str:
    check_file_name(name, _where(info))
    return name


def _is_known_version(version: object, info: ValidationInfo) -> object:
    """BadInputError with the advice, for a version that this program does not read."""
    if isinstance(version, int) and version not in (3, FORMAT_VERSION):
        advice = "upgrade unified-latents" if version > FORMAT_VERSION else "export again with this version's ul-export"
        raise BadInputError(f"{_where(info)}: format_version {version}, this program reads {FORMAT_VERSION}; {advice}")
    return version


def _is_plain(value: JsonValue, depth: int = 2) -> JsonValue:
    """ValueError for a number that is not finite, and for nesting below MAX_DEPTH; `depth` is that of `value`."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is not finite")
    if isinstance(value, (dict, list)):
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        for part in value.values() if isinstance(value, dict) else value:
            _is_plain(part, depth + 1)
    return value


FileName = Annotated[str, AfterValidator(_is_file_name)]
Record = Annotated[dict[str, JsonValue], AfterValidator(_is_plain)]


def is_bundle(folder: Path) -> bool:
    """Whether a folder has a bundle's manifest; no more of it is looked at."""
    return (folder / MANIFEST_NAME).is_file()


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ImageFormat(_Part):
    """Images of the bundle: square, values in [-1, 1]. To encode, another shape is cut to a square (`fit` crop) or laid
    on `background` (pad), which also fills transparent inputs."""

    channels: Annotated[int, Field(ge=1, le=16)]
    size: Count
    background: Annotated[str, Field(pattern=r"^#[0-9a-f]{6}$")] = "#ffffff"
    fit: Literal["crop", "pad"] = "crop"


class LatentFormat(_Part):
    """Latents between the networks: square."""

    channels: Count
    size: Count


class LogsnrRange(_Part):
    """Ends of a noise schedule, log(alpha^2 / sigma^2); beyond 100, sigma and alpha are nothing in float32."""

    min: Annotated[float, Field(ge=-100.0, le=100.0)]
    max: Annotated[float, Field(ge=-100.0, le=100.0)]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min < self.max:
            raise ValueError(f"min {self.min} must be below max {self.max}")
        return self


class DecoderDefaults(_Part):
    """How the decoder is sampled unless asked otherwise; by `student` in place of the decoder itself."""

    student: StudentName | None = None
    sampler: Annotated[Text, _taken_by(parse_sampler)]
    grid: Annotated[Text, _taken_by(parse_grid)]
    num_steps: Count


class PriorDefaults(DecoderDefaults):
    """How the prior is sampled; guidance 1 = none, applied for logsnr in `guidance_interval` (None = everywhere).

    `guidance_rescale` is phi of Lin et al. 2023, 0 = none.
    """

    guidance: Annotated[float, Field(ge=0.0, le=1000.0)]
    guidance_interval: tuple[FiniteFloat, FiniteFloat] | None = None
    guidance_rescale: Annotated[FiniteFloat, Field(ge=0.0, le=1.0)] = 0.0


class Defaults(_Part):
    """How images are sampled unless asked otherwise, by the networks that the students learned from."""

    prior: PriorDefaults
    decoder: DecoderDefaults


class Preset(Defaults):
    """Settings with a name, what an image costs with them, and how good images are, as ul-tune measured it."""

    calls: Count  # of networks, a guided call is one
    flops: Annotated[int, Field(ge=0)] = 0  # of an image
    quality: Record = {}


class TensorFormat(_Part):
    """A graph input or output; a string in `shape` is a dynamic dimension."""

    name: Text
    dtype: Literal["float32", "int64", "uint8"]
    shape: Annotated[tuple[Dimension, ...], Field(max_length=8), FailFast()]


class Graph(_Part):
    """An ONNX graph without weights, and the safetensors file that holds its initializers, if only a few or none.

    `float32_file`: the same graph over the same weights computing in float32, where `precision` is another: for
    CPUs without that arithmetic, and to make an image again that was not finite.
    """

    file: FileName
    weights: FileName
    float32_file: FileName | None = None
    precision: Literal["fp32", "fp16", "bf16", "int8"]
    opset: Annotated[int, Field(ge=1, le=1000)]
    inputs: Annotated[tuple[TensorFormat, ...], Field(max_length=16), FailFast()]
    outputs: Annotated[tuple[TensorFormat, ...], Field(max_length=16), FailFast()]


class Student(_Part):
    """A network that was trained to take few calls, in the place of a step graph's own.

    It has the steps of its training; guidance, which is part of it, is not applied again.
    """

    place: StepName
    graph: Graph
    sampler: Annotated[Text, _taken_by(parse_sampler)]
    grid: Annotated[Text, _taken_by(parse_grid)]
    num_steps: Count
    guidance: Annotated[float, Field(ge=0.0, le=1000.0)] = 1.0  # of the trajectories that it learned
    method: Text
    step: Annotated[int, Field(ge=0)]  # of its training
    quality: Record = {}


class Provenance(_Part):
    """Where the weights came from."""

    run_id: Text
    config_sha256: Sha256
    data_fingerprint: Text
    step: Annotated[int, Field(ge=0)]
    weights: Text
    code_version: Text
    created: Text | None = None
    encoder_sha256: Sha256 | None = None  # of its weights in torch: equal for all priors that learned its latents


class FileEntry(_Part):
    """A file of the bundle as it must be found; `size` in bytes."""

    sha256: Sha256
    size: Annotated[int, Field(ge=0, le=2**36)]


class BundleInfo(_Part):
    """All that an exporter says about a bundle; `write_bundle` adds the hashes."""

    format: Literal["unified-latents-bundle"] = FORMAT
    format_version: Annotated[Literal[3, 4], BeforeValidator(_is_known_version)] = FORMAT_VERSION
    name: Text
    image: ImageFormat
    latent: LatentFormat
    classes: Annotated[tuple[Text, ...], Field(max_length=65536), FailFast()]
    logsnr_z: LogsnrRange
    logsnr_x: LogsnrRange
    defaults: Defaults
    graphs: dict[Annotated[GraphName, Field(pattern=r"^(encoder|prior_step|decoder_step|pixels)$")], Graph]
    students: Annotated[dict[StudentName, Student], Field(max_length=16)] = {}
    presets: Annotated[dict[Text, Preset], Field(max_length=16)] = {}
    preset: Text | None = None  # that is taken unless asked otherwise; None: `defaults`
    provenance: Provenance
    recipe: Record = {}  # the whole recipe of the run, as ul-train takes it
    quality: Record = {}
    parity: Record = {}

    @property
    def num_classes(self) -> int:
        """Number of labels; 0 = unconditional."""
        return len(self.classes)

    @property
    def all_graphs(self) -> dict[GraphName, Graph]:
        """The graphs of the bundle and those of its students, each by its name."""
        return {**self.graphs, **{name: student.graph for name, student in self.students.items()}}

    @property
    def network_graphs(self) -> tuple[GraphName, ...]:
        """The graphs of networks: encoder, prior, decoder, students."""
        return (*NETWORK_GRAPHS, *self.students)

    def with_graphs(self, graphs: Mapping[GraphName, Graph]) -> Self:
        """With these in the places of its graphs and its students' graphs of those names."""
        own = {name: graphs.get(name, graph) for name, graph in self.graphs.items()}
        students = {
            name: student.model_copy(update={"graph": graphs.get(name, student.graph)})
            for name, student in self.students.items()
        }
        return self.model_copy(update={"graphs": own, "students": students})

    def students_of(self, place: StepName) -> list[str]:
        """Names of the students that take the place of this graph."""
        return [name for name, student in self.students.items() if student.place == place]

    def place_of(self, graph: GraphName) -> GraphName:
        """Of GRAPH_NAMES: the graph itself, or the one whose place a student takes."""
        return self.students[graph].place if graph in self.students else graph

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        for what, part in (("image", self.image), ("latent", self.latent)):
            if part.channels * part.size**2 > _MOST_VALUES:
                raise ValueError(f"{what}: {part.channels} x {part.size} x {part.size}; at most {_MOST_VALUES} values")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes: a name occurs twice")
        for name in GRAPH_NAMES:
            if name not in self.graphs:
                raise ValueError(f"graphs: {name} is missing")
        for name, graph in self.all_graphs.items():
            where = f"students.{name}.graph" if name in self.students else f"graphs.{name}"
            inputs, outputs = interface(self.place_of(name), self.image, self.latent)
            _check_tensors(f"{where}.inputs", graph.inputs, inputs)
            _check_tensors(f"{where}.outputs", graph.outputs, outputs)
        self._check_students()
        return self

    def _check_students(self) -> None:
        for name, student in self.students.items():
            if student.place != f"{name.partition('-')[0]}_step":
                raise ValueError(f"students.{name}: its place is {student.place}")
        for what, settings in {"defaults": self.defaults, **self.presets}.items():
            for network, part in (("prior", settings.prior), ("decoder", settings.decoder)):
                if part.student is None:
                    continue
                if part.student not in self.students or self.students[part.student].place != f"{network}_step":
                    raise ValueError(f"{what}: {part.student} is no student of the {network}")
        if self.defaults.prior.student or self.defaults.decoder.student:
            raise ValueError("defaults: are of the networks themselves, without students")
        if self.preset is not None and self.preset not in self.presets:
            raise ValueError(f"preset: {self.preset} is not in presets")


class Manifest(BundleInfo):
    """manifest.json, complete: `files` lists every file of the bundle but itself."""

    files: Annotated[dict[FileName, FileEntry], Field(max_length=MAX_FILES)]

    @model_validator(mode="after")
    def _closed(self) -> Self:
        if len({name.casefold() for name in [*self.files, MANIFEST_NAME]}) != len(self.files) + 1:
            raise ValueError("files: two names differ only in case, or the manifest lists itself")
        for graph_name, graph in self.all_graphs.items():
            for file in (graph.file, graph.weights, graph.float32_file):
                if file is not None and file not in self.files:
                    raise ValueError(f"{graph_name}: {file} is not in files")
        return self


def interface(graph: GraphName, image: ImageFormat, latent: LatentFormat) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Tensor names and shapes (inputs, outputs) that a graph of GRAPH_NAMES has in these formats."""
    x: Shape = ("b", image.channels, image.size, image.size)
    z: Shape = ("b", latent.channels, latent.size, latent.size)
    if graph == "encoder":
        return {"x": x}, {"z_clean": z}
    if graph == "pixels":
        return {"x": x}, {"images": ("b", image.size, image.size, image.channels), "sum": ("b",)}
    state: str
    state, shape = ("z", z) if graph == "prior_step" else ("x", x)
    inputs: dict[str, Shape] = {state: shape, "history": ("b", HISTORY, *shape[1:]), "noise": shape}
    inputs["row"] = ("b", ROW_SIZE)
    if graph == "prior_step":
        inputs |= {"label": ("b", "g"), "weight": ("b", "g"), "guide": shape, "guide_weight": ("b",), "rescale": ("b",)}
    else:
        inputs["z_0"] = z
    return inputs, {f"{state}_next": shape, "pred": shape, "history_next": inputs["history"]}


def dtype_of(tensor: str) -> Literal["float32", "int64", "uint8"]:
    """The element type of the graphs' tensor of this name."""
    return "int64" if tensor == "label" else "uint8" if tensor == "images" else "float32"


def _check_tensors(where: str, tensors: tuple[TensorFormat, ...], expected: dict[str, Shape]) -> None:
    names = [tensor.name for tensor in tensors]
    if sorted(names) != sorted(expected):
        raise ValueError(f"{where}: names are {', '.join(names)}; expected {', '.join(expected)}")
    for tensor in tensors:
        want, dtype = expected[tensor.name], dtype_of(tensor.name)
        same = len(want) == len(tensor.shape) and all(
            isinstance(given, str) if isinstance(wanted, str) else given == wanted
            for given, wanted in zip(tensor.shape, want, strict=True)
        )
        if not same or tensor.dtype != dtype:
            given = f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"{where}: {tensor.name} is {given}; image and latent need {dtype} {list(want)}")


def _checked_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """ValueError for what pydantic would take or be long about: a key that occurs twice, and very many keys."""
    if len(pairs) > MAX_KEYS:
        raise ValueError(f"{len(pairs)} keys in one object; at most {MAX_KEYS} are allowed")
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise ValueError(f"key {key[:100]!a} occurs twice")
    return dict(pairs)


def parse_manifest(data: bytes, where: str = MANIFEST_NAME) -> Manifest:
    """The manifest in these bytes. BadInputError: damaged, or of another version; UntrustedError: names that escape."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise BadInputError(f"{where}: {len(data)} bytes; at most {MAX_MANIFEST_BYTES} are allowed")
    try:
        found = json.loads(data.decode(), object_pairs_hook=_checked_object)
        if isinstance(found, dict) and (name := found.get("format")) != FORMAT:
            raise ValueError(f"format is {str(name)[:60]!a}, expected {FORMAT!r}")
        return Manifest.model_validate_json(data, strict=True, context=where)
    except ValidationError as error:
        raise BadInputError(f"{where}: {first_error(error)}; export the bundle again") from error
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{where}: not readable: {error}; copy or export the bundle again") from error


def first_error(error: ValidationError) -> str:
    """One line, safe to print: where, what is wrong, and what was given."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = ascii(".".join(str(part) for part in first["loc"]))[1:-1][:200]
    given = f" (given {str(first['input'])[:60]!a})" if place else ""
    return f"{place + ': ' if place else ''}{first['msg'].removeprefix('Value error, ')[:300]}{given}"


def manifest_bytes(info: BundleInfo, files: Mapping[str, FileEntry]) -> bytes:
    """The bytes of manifest.json, checked; their SHA-256 is the bundle's hash. Errors as `parse_manifest`."""
    value = info.model_dump(mode="json") | {"format_version": FORMAT_VERSION}
    value |= {"files": {name: files[name].model_dump() for name in sorted(files)}}
    data = (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
    parse_manifest(data)
    return data
