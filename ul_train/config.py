"""What a training run is: the recipe, typed and validated, with presets as data and `--set field=value` on top."""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterator, Sequence
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ul_runtime.diffusion import Schedule, resolution_shift
from ul_runtime.errors import UsageError
from ul_runtime.manifest import Sha256, StudentName, Text
from ul_runtime.samplers import parse_grid, parse_sampler
from ul_train.objective import Objective

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A table of the recipe; unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ImageConfig(Section):
    """The images as the model sees them."""

    size: Positive  # pixels, square
    channels: Literal[1, 3] = 3  # 1 grey, 3 RGB
    background: str = "white"  # under transparent pixels and around padded images: name or #rrggbb
    fit: Literal["crop", "pad"] = "crop"  # how another shape becomes a square
    flip: bool = True  # mirror half of the training images
    labels: bool = True  # class = sub-folder; false trains without classes
    max_rejected_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5  # a larger share of unusable images is an error


class EncoderConfig(Section):
    """ResNet encoder; downsampling patch * 2^(stages - 1)."""

    patch: Positive = 2
    channels: tuple[Positive, ...]
    blocks: tuple[Positive, ...]


class PriorConfig(Section):
    """Prior or base: a transformer over the latent, one level or several."""

    widths: tuple[Positive, ...]
    blocks: tuple[Positive, ...]
    head_dim: Positive = 64
    dropout: Share = 0.0


class DecoderConfig(Section):
    """UViT decoder; its transformer's grid, size / (patch * 2^stages), is the latent's."""

    patch: Positive = 2
    channels: tuple[Positive, ...]
    blocks: tuple[Positive, ...]
    width: Positive
    middle_blocks: Positive
    head_dim: Positive = 64
    dropout: Share = 0.0


class ObjectiveConfig(Section):
    """The loss; all logsnr values are the full log(alpha^2 / sigma^2)."""

    loss_factor: Annotated[float, Field(gt=0.0)] = 1.5  # c_lf: weight of a decoder nat at low logsnr
    target_bits_per_pixel: Annotated[float, Field(gt=0.0)] | None = None  # steers loss_factor, which is where it starts
    bias: float = 0.0  # b of the decoder's sigmoid weight, logsnr
    base_bias: float = 2.0  # b of the base's sigmoid weight, logsnr
    latent_logsnr: float = 5.0  # least noise of the prior = noise of z_0
    latent_logsnr_min: float = -10.0
    latent_schedule: Literal["linear", "cosine"] = "linear"
    image_logsnr_max: float = 10.0  # at 64 px; moved by 2 log(64 / size)
    image_logsnr_min: float = -10.0
    prior_ramp_steps: Annotated[int, Field(ge=0)] = 600  # steps until the prior's full gradient reaches the encoder
    # What the paper compares with; all off in Unified Latents.
    normal_weight: Annotated[float, Field(gt=0.0)] | None = (
        None  # the latent costs KL(z_0 || N(0, I)) times this instead
    )
    reconstruction: Literal["mse"] | None = None  # the decoder makes the image in one step, for the squared error
    learned_variance: bool | None = None  # the encoder adds noise of its own, whose size it learns and pays for

    @model_validator(mode="after")
    def _coherent(self) -> "ObjectiveConfig":
        for low_name, low, high_name, high in (
            ("latent_logsnr_min", self.latent_logsnr_min, "latent_logsnr", self.latent_logsnr),
            ("image_logsnr_min", self.image_logsnr_min, "image_logsnr_max", self.image_logsnr_max),
        ):
            if not low < high:
                raise ValueError(f"objective.{low_name} {low} must be below objective.{high_name} {high}")
        if self.learned_variance and self.normal_weight is not None:
            raise ValueError("objective.learned_variance and objective.normal_weight exclude each other; give one")
        return self


class StageConfig(Section):
    """Optimisation of one stage."""

    steps: Positive
    batch_size: Positive  # images an optimiser step
    accumulate: Positive = 1  # micro-batches that a step is split into
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-3
    final_learning_rate: Annotated[float, Field(ge=0.0)] = 0.0  # share of learning_rate at the end of the cosine decay
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    clip: Annotated[float, Field(gt=0.0)] = 1.0  # largest gradient norm
    ema_decay: Share = 0.999
    label_dropout: Share = 0.1  # share of images whose label is hidden; base only


Method = Literal["trajectory", "moments"]
METHODS: tuple[str, ...] = get_args(Method)


class StudentConfig(StageConfig):
    """A student: few calls in the place of many, learned from trajectories of the averaged networks, its teacher."""

    warmup_steps: Annotated[int, Field(ge=0)] = 50
    learning_rate: Annotated[float, Field(gt=0.0)] = 5e-4
    ema_decay: Share = 0.99
    method: Method = "trajectory"
    sampler: Literal["ddim", "dpmpp2m", "ab2", "ab3"] = "dpmpp2m"  # of a trajectory; one whose states are on it
    grid: str | None = None  # of the trajectory and of the student; none: that of [sampling]
    examples: Positive = 12800  # trajectories of the teacher; method moments has none
    teacher_steps: Positive = 8  # of a trajectory
    guidance: Annotated[float, Field(ge=0.0)] | None = None  # of the teacher; none: sampling.guidance; prior only
    sampled_share: Share = 0.25  # of latents that the prior samples, the others are those of images; decoder only


class RunConfig(Section):
    """Everything around the optimisation."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of the networks (autocast); auto: bf16 where it is native
    log_every: Positive = 10  # steps
    eval_every: Positive = 200  # steps between held-out figures and previews
    eval_images: Positive = 256
    checkpoint_every: Positive = 200  # steps
    keep_checkpoints: Positive = 2  # newest ones kept of each stage


class SamplingConfig(Section):
    """Defaults that are written into the bundle."""

    sampler: str = "dpmpp2m"
    grid: str = "mix"
    steps: Positive = 32
    guidance: float = 1.5
    guidance_interval: tuple[float, float] = (-3.0, 1.5)  # logsnr
    guidance_rescale: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0  # phi of Lin et al. 2023; 0 = off
    decoder_sampler: str = "dpmpp2m"
    decoder_grid: str = "mix"
    decoder_steps: Positive = 8

    @model_validator(mode="after")
    def _coherent(self) -> "SamplingConfig":
        try:
            parse_sampler(self.sampler, "sampling.sampler")
            parse_grid(self.grid, "sampling.grid")
            parse_sampler(self.decoder_sampler, "sampling.decoder_sampler")
            parse_grid(self.decoder_grid, "sampling.decoder_grid")
        except UsageError as error:
            raise ValueError(error) from None
        low, high = self.guidance_interval
        if not low < high:
            raise ValueError(f"sampling.guidance_interval is [{low}, {high}]; give the lower logsnr first")
        return self


class StagesConfig(Section):
    """Optimisation of each stage, by the name of its class in stages.py; None: a recipe may be without."""

    joint: StageConfig
    decoder: StageConfig | None = None
    base: StageConfig

    def of(self, name: str) -> StageConfig:
        """Of a stage that the recipe has."""
        stage: StageConfig = getattr(self, name)
        return stage


class Config(Section):
    """A whole recipe; `students` by network and calls, such as prior-4."""

    name: Text
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    init: Sha256 | None = None  # of the bundle that --init has begun with: stage joint is not trained
    latent_channels: Annotated[int, Field(gt=0, le=65536)]  # as in a manifest
    image: ImageConfig
    encoder: EncoderConfig
    prior: PriorConfig
    decoder: DecoderConfig
    base: PriorConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    stages: StagesConfig
    students: dict[StudentName, StudentConfig] = {}
    run: RunConfig = RunConfig()
    sampling: SamplingConfig = SamplingConfig()

    def of_stage(self, name: str) -> StageConfig:
        """Optimisation of a stage or student that the recipe has."""
        return self.students[name] if name in self.students else self.stages.of(name)

    @property
    def downsampling(self) -> int:
        """Image pixels along one side of a latent pixel."""
        return self.encoder.patch * int(2 ** (len(self.encoder.channels) - 1))

    @property
    def latent_size(self) -> int:
        """Latent pixels along a side."""
        return self.image.size // self.downsampling

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """c h w of an image."""
        return self.image.channels, self.image.size, self.image.size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """c h w of a latent."""
        return self.latent_channels, self.latent_size, self.latent_size

    def make_objective(self) -> Objective:
        """The schedules and weights that `objective` describes."""
        o = self.objective
        shift = resolution_shift(self.image.size)
        return Objective(
            schedule_z=Schedule(o.latent_schedule, o.latent_logsnr_min, o.latent_logsnr),
            schedule_x=Schedule("cosine", o.image_logsnr_min, o.image_logsnr_max, shift),
            loss_factor=o.loss_factor,
            bias=o.bias,
            base_bias=o.base_bias,
            normal_weight=o.normal_weight,
            reconstruction=o.reconstruction or "diffusion",
        )

    @model_validator(mode="after")
    def _coherent(self) -> "Config":
        misfit = next(chain(_misfits_of_networks(self), _misfits_of_training(self)), None)
        if misfit is not None:
            raise ValueError(misfit)
        return self


def _misfits_of_networks(config: Config) -> Iterator[str]:
    encoder, decoder, vits = config.encoder, config.decoder, {"prior": config.prior, "base": config.base}
    widths = {"encoder": encoder.channels, "decoder": decoder.channels} | {k: vit.widths for k, vit in vits.items()}
    for name, given in widths.items():
        blocks = getattr(config, name).blocks
        if len(given) != len(blocks) or not given:
            yield f"{name} has {len(given)} widths and {len(blocks)} block counts; give one of each a stage"
    if config.image.size % config.downsampling:
        yield f"image.size is {config.image.size}, the encoder downsamples by {config.downsampling}; give a multiple"
    middle = decoder.patch * 2 ** len(decoder.channels)
    if middle != config.downsampling:
        yield (
            f"decoder: its middle is at 1/{middle} of the image, the latent at 1/{config.downsampling}; "
            "give the decoder as many stages as the encoder has downsamplings after its patching"
        )
    for name, vit in vits.items():
        if config.latent_size % 2 ** (len(vit.widths) - 1):
            yield f"{name} has {len(vit.widths)} levels, the latent is {config.latent_size} px; give fewer levels"
        if any(width % vit.head_dim for width in vit.widths):
            yield f"{name}.widths {list(vit.widths)} must be multiples of head_dim {vit.head_dim}"
    if decoder.width % decoder.head_dim:
        yield f"decoder.width {decoder.width} must be a multiple of head_dim {decoder.head_dim}"


def _misfits_of_training(config: Config) -> Iterator[str]:
    steps = config.sampling.decoder_steps
    if config.objective.reconstruction == "mse" and steps != 1:
        yield (
            "objective.reconstruction is mse, whose decoder makes an image in one step, and "
            f"sampling.decoder_steps is {steps}; give 1"
        )
    for name, student in config.students.items():
        network, calls = name.split("-")
        if network == "decoder" and (calls != "1" or student.method != "trajectory"):
            yield f"students.{name}: a student of the decoder takes one call, by method trajectory; call it decoder-1"
        if network == "decoder" and config.objective.reconstruction == "mse":
            yield f"students.{name}: with objective.reconstruction mse the decoder itself takes one call"
        try:
            parse_grid(student.grid or "mix", f"students.{name}.grid")
        except UsageError as error:
            yield str(error)
        if network == "prior" and student.method == "trajectory" and student.teacher_steps % int(calls):
            yield f"students.{name}.teacher_steps is {student.teacher_steps}; give a multiple of {calls}"
    for name, stage in chain(config.stages, config.students.items()):
        if stage is not None and stage.batch_size % stage.accumulate:
            size, parts = stage.batch_size, stage.accumulate
            yield f"stages.{name}.batch_size {size} must be a multiple of accumulate {parts}"


def preset_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("ul_train") / "presets"
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def load_config(recipe: str, overrides: list[str]) -> Config:
    """A preset's name or a TOML file, with `section.field=value` overrides (TOML values); UsageError says which key."""
    text, where = _read_recipe(recipe)
    try:
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"{where}: not TOML: {error}") from None
    earlier = {"joint": "joint", "base_stage": "base"}  # section of before [stages.*] -> stage
    if not earlier.keys().isdisjoint(values) and "stages" not in values:
        values["stages"] = {stage: values.pop(section) for section, stage in earlier.items() if section in values}
    for override in overrides:
        apply_override(values, override)
    return validate(values, where)


def _read_recipe(recipe: str) -> tuple[str, str]:
    if recipe in preset_names():
        preset = resources.files("ul_train") / "presets" / f"{recipe}.toml"
        return preset.read_text(encoding="utf-8"), f"preset {recipe}"
    path = Path(recipe)
    if not path.is_file():
        near = difflib.get_close_matches(recipe, preset_names(), 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(
            f"recipe {recipe!r} is neither a preset nor a file; {hint}presets: {', '.join(preset_names())}"
        )
    try:
        return path.read_text(encoding="utf-8-sig"), recipe  # some editors put a byte order mark first
    except UnicodeDecodeError:
        raise UsageError(f"{recipe}: not TOML: not a text file in UTF-8") from None


def apply_override(values: dict[str, Any], override: str) -> None:
    """Change one field of a recipe's values, as --set says it. UsageError."""
    key, separator, text = override.partition("=")
    if not separator:
        raise UsageError(f"--set {override!r}: expected field=value, for example --set stages.joint.steps=500")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text.strip()  # a bare word is a string
    *sections, field = key.strip().split(".")
    table = values
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise UsageError(f"--set {override!r}: {section} is a value, not a section")
    table[field] = value


def validate(values: dict[str, Any], where: str) -> Config:
    """A Config of plain values; UsageError with the key, the value, and the nearest known name."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{where}: {'; '.join(_explain(error.errors()))}") from None


def _explain(errors: Sequence[Any]) -> Iterator[str]:
    """What is wrong, unknown keys first, missing ones as one list."""
    kinds: dict[str, list[Any]] = {"extra_forbidden": [], "other": [], "missing": []}
    for item in errors:
        kinds.get(item["type"], kinds["other"]).append(item)
    yield from (_explain_unknown(_key(item)) for item in kinds["extra_forbidden"])
    yield from (
        item["msg"].removeprefix("Value error, ")
        if item["type"] == "value_error"
        else f"{_key(item)} = {item['input']!r}: {item['msg'].lower()}"
        for item in kinds["other"]
    )
    if missing := [_key(item) for item in kinds["missing"]]:
        yield f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"


def _key(item: Any) -> str:
    return ".".join(str(part) for part in item["loc"])


def _explain_unknown(key: str) -> str:
    section, _, field = key.rpartition(".")
    same_field = [known for known in _known_keys() if known.rpartition(".")[2] == field]  # in another section
    if len(same_field) == 1:
        hint = same_field[0]
    elif near := difflib.get_close_matches(section, [known.rpartition(".")[0] for known in same_field], 1, cutoff=0.3):
        hint = f"{near[0]}.{field}"
    else:
        hint = next(iter(difflib.get_close_matches(key, _known_keys(), 1, 0.7)), "")
    return f"there is no key {key}" + (f"; did you mean {hint}?" if hint else "")


def _known_keys(section: type[Section] = Config, prefix: str = "") -> list[str]:
    """Every section and every field of a recipe, dotted."""
    keys: list[str] = []
    for name, entry in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(entry.annotation, type) and issubclass(entry.annotation, Section):
            keys += _known_keys(entry.annotation, f"{prefix}{name}.")
    return keys


def config_toml(config: Config) -> str:
    """The resolved recipe as TOML that loads back to the same Config; what is off (None) is left out."""
    return "\n".join(_toml_lines(config.model_dump(mode="json", exclude_none=True))) + "\n"


def _toml_lines(table: dict[str, Any], prefix: str = "") -> list[str]:
    sections = {key: value for key, value in table.items() if isinstance(value, dict)}
    lines = [f"{key} = {_toml_value(value)}" for key, value in table.items() if key not in sections]
    if prefix and lines:
        lines = ["", f"[{prefix[:-1]}]", *lines]
    for key, value in sections.items():
        lines += _toml_lines(value, f"{prefix}{key}.")
    return lines


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML's escapes are JSON's
    if isinstance(value, list):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    return repr(value)


def config_hash(config: Config) -> str:
    """SHA-256 of the resolved recipe."""
    return hashlib.sha256(config_toml(config).encode()).hexdigest()
