"""What a run can be told: options as fields of dataclasses, sampler settings over the bundle's defaults, labels.

Commands import it for their help: what takes long to import is imported where it is used.
"""

import dataclasses
import difflib
import math
import operator
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from ul_runtime.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

NO_LABEL = "none"
MOST_STEPS = 65536  # as in a manifest
MOST_GUIDANCE = 3e38  # what float32 holds
_NUMBER = re.compile(r"#(0|[1-9][0-9]{0,9})")  # of a class


def option(
    default: Any,
    help: str,
    *names: str,
    metavar: str | None = None,
    shown: str | bool = True,
    min: int | None = None,
) -> Any:
    """A field of a dataclass that commands offer as an option; ul_runtime.cli.options.with_options expands it.

    `names` default to the field's own; `shown` is the default as help says it.
    """
    metadata = {"option": {"names": names, "help": help, "metavar": metavar, "show_default": shown, "min": min}}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def threads_option() -> Any:
    """--threads, which several commands take."""
    return option(None, "CPU threads.", metavar="COUNT", shown="as cores are free")


class Overrides(TypedDict, total=False):
    """Keyword arguments of generate and decode; what is absent or None comes from the bundle's manifest."""

    preset: str | None  # settings of the bundle by their name; "none": those without students
    students: Sequence[str] | None  # in the place of the bundle's own networks, with the steps of their training
    steps: int | None  # of the prior
    sampler: str | None
    grid: str | None
    guidance: float | None
    guidance_interval: tuple[float, float] | None  # logsnr; (-inf, inf) = everywhere
    guidance_rescale: float | None  # phi of Lin et al. 2023, 0 = off
    decoder_steps: int | None
    decoder_sampler: str | None
    decoder_grid: str | None


@dataclass(frozen=True)
class SamplerSettings:
    """One loop: which table, and how many steps; UsageError for names that are not known.

    `student`: the network in the place of the bundle's own.
    """

    sampler: str
    grid: str
    num_steps: int
    student: str | None = None

    def __post_init__(self) -> None:
        from ul_runtime.samplers import parse_grid, parse_sampler

        for what, name in (("sampler", self.sampler), ("grid", self.grid)):
            if not isinstance(name, str):
                raise UsageError(f"the {what} is {name!r}; expected its name")
        parse_sampler(self.sampler)
        parse_grid(self.grid)
        check_whole("the number of steps", self.num_steps)
        if not 1 <= self.num_steps <= MOST_STEPS:
            raise UsageError(f"the number of steps is {self.num_steps}; expected 1 to {MOST_STEPS}")


@dataclass(frozen=True)
class Settings:
    """Everything but bundle, seed, index and label that a generated image depends on."""

    prior: SamplerSettings
    decoder: SamplerSettings
    guidance: float = 1.0
    guidance_interval: tuple[float, float] | None = None  # logsnr; None = everywhere
    guidance_rescale: float = 0.0  # where guided; 0 = off

    def __post_init__(self) -> None:
        if not 0.0 <= self.guidance <= MOST_GUIDANCE:
            raise UsageError(f"guidance is {self.guidance}; expected 0 to {MOST_GUIDANCE:g}, 1 = off")
        if self.guidance_interval is not None and not self.guidance_interval[0] < self.guidance_interval[1]:
            low, high = self.guidance_interval
            raise UsageError(f"the guidance interval is {low},{high}; expected LO below HI, in logsnr")
        if not 0.0 <= self.guidance_rescale <= 1.0:
            raise UsageError(f"guidance rescale is {self.guidance_rescale}; expected 0 (off) to 1")

    def as_dict(self) -> dict[str, Any]:
        """Flat, JSON-ready: prior_sampler, prior_grid, ... for provenance and fingerprints; students if any."""
        interval = self.guidance_interval
        loops = {"prior": asdict(self.prior), "decoder": asdict(self.decoder)}
        return {
            **{f"{loop}_{key}": part[key] for loop, part in loops.items() for key in part if part[key] is not None},
            "guidance": self.guidance,
            "guidance_interval": None if interval is None else [float(end) for end in interval],
            "guidance_rescale": self.guidance_rescale,
        }


_OF_PRIOR = ("sampler", "grid", "steps", "guidance", "guidance_interval", "guidance_rescale")
_OF_DECODER = ("decoder_sampler", "decoder_grid", "decoder_steps")
NO_PRESET = "none"


def resolve_settings(manifest: Any, given: Overrides, *, can_guide: bool) -> Settings:
    """The settings of a bundle's manifest with `given` over them; UsageError for what cannot be.

    Those of the preset that is asked for, or of the bundle's own preset, or of its defaults. A student samples as it
    was trained: where something else is asked of the prior (or the decoder), and no student or preset by name, the
    bundle's own network takes its place, with its defaults. `can_guide`: there are classes, or a guide.
    """
    if unknown := sorted(given.keys() - Overrides.__annotations__.keys()):
        near = difflib.get_close_matches(unknown[0], [*Overrides.__annotations__, "labels", "seed", "batch_size"], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"there is no setting {unknown[0]}{hint}")
    asked: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if not can_guide and (asked.get("guidance") or 1.0) != 1.0:
        raise UsageError(
            f"guidance {given['guidance']} asks for classes, the bundle has none; leave it out, or give a guide"
        )
    prior, decoder = (_Part.of(manifest, network, asked) for network in ("prior", "decoder"))
    start, wanted = prior.start, prior.asked
    guidance = as_number("guidance", wanted.get("guidance", start.guidance))
    rescale = as_number("guidance rescale", wanted.get("guidance_rescale", start.guidance_rescale))
    return Settings(
        prior=prior.settings("sampler", "grid", "steps"),
        decoder=decoder.settings("decoder_sampler", "decoder_grid", "decoder_steps"),
        guidance=guidance if can_guide else 1.0,
        guidance_interval=as_interval(wanted.get("guidance_interval", start.guidance_interval)),
        guidance_rescale=rescale,
    )


@dataclass(frozen=True)
class _Part:
    """One network's settings: those to start from, and what is asked over them."""

    start: Any  # PriorDefaults or DecoderDefaults
    asked: dict[str, Any]

    @classmethod
    def of(cls, manifest: Any, network: str, asked: dict[str, Any]) -> "_Part":
        mine = {name: asked[name] for name in (_OF_PRIOR if network == "prior" else _OF_DECODER) if name in asked}
        own, start = getattr(manifest.defaults, network), getattr(_preset(manifest, asked.get("preset")), network)
        student, named = start.student, "preset" in asked
        if "students" in asked:
            found, named = _student(manifest, network, asked["students"]), True
            if found is not None:
                student, start = found, _as_trained(manifest.students[found], found, own)
            elif "preset" not in asked:
                student, start = None, own
        if student is None:
            return cls(start, mine)
        learned = {"guidance": manifest.students[student].guidance}
        trained = {name: learned.get(name, _value(start, name)) for name in mine}
        other = {name: value for name, value in mine.items() if not _same(name, value, trained[name])}
        if not other:
            return cls(start, {})
        if named:
            name, value = next(iter(other.items()))
            raise UsageError(
                f"student {student} was trained for {_words(name)} {trained[name]}, not {value}; leave that out, "
                f"or the student: the {network} itself takes any"
            )
        return cls(own, mine)

    def settings(self, sampler: str, grid: str, steps: str) -> SamplerSettings:
        asked, start = self.asked, self.start
        return SamplerSettings(
            asked.get(sampler, start.sampler),
            asked.get(grid, start.grid),
            asked.get(steps, start.num_steps),
            start.student,
        )


def _preset(manifest: Any, name: str | None) -> Any:
    """Settings of the manifest by their name. UsageError."""
    if name == NO_PRESET:
        return manifest.defaults
    name = name if name is not None else manifest.preset
    if name is None:
        return manifest.defaults
    if name not in manifest.presets:
        known = ", ".join((*manifest.presets, NO_PRESET))
        raise UsageError(f"preset {name!r}: the bundle has no such preset; expected {known}")
    return manifest.presets[name]


def _student(manifest: Any, network: str, names: Any) -> str | None:
    """The one of these students that takes the place of a network. UsageError."""
    given = [names] if isinstance(names, str) else list(names)
    for name in given:
        if name not in manifest.students:
            known = ", ".join(manifest.students) or "none"
            raise UsageError(f"student {name!r}: the bundle has no such student; it has {known}")
    found = [name for name in given if manifest.students[name].place == f"{network}_step"]
    if len(found) > 1:
        raise UsageError(f"students {found[0]} and {found[1]}: both stand for the {network}; give one")
    return found[0] if found else None


def _as_trained(student: Any, name: str, own: Any) -> Any:
    """The settings of a student, in the form of its network's defaults."""
    changes = {"student": name, "sampler": student.sampler, "grid": student.grid, "num_steps": student.num_steps}
    if hasattr(own, "guidance"):  # which is part of the student
        changes |= {"guidance": 1.0, "guidance_interval": None, "guidance_rescale": 0.0}
    return own.model_copy(update=changes)


def _value(start: Any, name: str) -> Any:
    """What a part's settings say where `name` would be given."""
    field = name.removeprefix("decoder_")
    return getattr(start, "num_steps" if field == "steps" else field)


def _same(name: str, given: Any, trained: Any) -> bool:
    return bool(as_interval(given) == as_interval(trained) if name == "guidance_interval" else given == trained)


def _words(name: str) -> str:
    return name.replace("_", " ")


def no_label(classes: Sequence[str]) -> str:
    """How "no label" is written for these classes: `none`, or `#none` if a class is called `none`."""
    name = NO_LABEL
    while name in classes:
        name = f"#{name}"
    return name


def label_index(label: str, classes: Sequence[str]) -> int:
    """The number of a label: a class name, or else `#3` for class number 3, `none` or `#none` for len(classes).

    UsageError for any other text, and for what is no text: 1 may be the class called 1, or class number 1.
    """
    if not isinstance(label, str):
        raise UsageError(f"label {label!r}: is no text; expected a class name, '#3' for class number 3, or 'none'")
    for name in (label, unicodedata.normalize("NFC", label)):  # the form that training gives names
        if name in classes:
            return list(classes).index(name)
    if label.lstrip("#") == NO_LABEL:
        return len(classes)
    if not classes:
        raise UsageError(f"label {label!r}: the bundle has no classes; leave the label out")
    if not _NUMBER.fullmatch(label):
        raise UsageError(f"label {label!r} is not a class of the bundle; {_nearest(label, classes)}")
    if (number := int(label[1:])) >= len(classes):
        raise UsageError(f"label {label!r} is out of range; expected '#0' to '#{len(classes) - 1}', or a class name")
    return number


def _nearest(label: str, classes: Sequence[str]) -> str:
    near = difflib.get_close_matches(label.strip().lower(), [name.lower() for name in classes], n=1, cutoff=0.5)
    names = [name for name in classes if near and name.lower() == near[0]]
    if label.isdecimal() and int(label) < len(classes):
        return f"'#{int(label)}' is class number {int(label)}, {classes[int(label)]!r}"
    return f"did you mean {names[0]!r}?" if names else f"the classes are {_some(classes)}"


def _some(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def label_cycle(labels: str | Iterable[str] | None, classes: Sequence[str]) -> tuple[int, ...]:
    """The labels that images take in turn: image i has entry i mod len. None = all classes, if there are any."""
    if labels is None:
        return tuple(range(len(classes))) or (0,)
    given = list(labels) if isinstance(labels, Iterable) and not isinstance(labels, str) else [labels]
    if not given:
        raise UsageError("the list of labels is empty; expected at least one, or None for all classes in turn")
    return tuple(label_index(label, classes) for label in given)


SEEDS = 2**64
INDICES = 2**63
MOST_IMAGES = 10**8  # by their number: a call holds their indices in memory


def as_indices(images: "int | Sequence[int] | np.ndarray") -> "np.ndarray":
    """A count (0, 1, ...) or a list of indices as int64; UsageError for what is not whole or out of range."""
    import numpy as np

    if isinstance(images, (int, np.integer)):
        check_count("the number of images", images, most=MOST_IMAGES)
        return np.arange(images, dtype=np.int64)
    try:
        numbers = [operator.index(index) for index in images]
    except TypeError as error:
        raise UsageError(f"image indices: {error}; a flat list of whole numbers is expected") from error
    for number in numbers:
        if not 0 <= number < INDICES:
            raise UsageError(f"image index {number} is out of range; expected 0 to 2^63 - 1")
    return np.array(numbers, np.int64)


def check_seed(seed: int) -> None:
    """UsageError for a seed that is not 0 to 2^64 - 1."""
    check_whole("the seed", seed)
    if not 0 <= seed < SEEDS:
        raise UsageError(f"the seed is {seed}; expected 0 to {SEEDS - 1}")


def check_whole(what: str, value: object) -> None:
    """UsageError for what is no whole number."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise UsageError(f"{what} is {value!r}; expected a whole number")


def as_number(what: str, value: Any) -> float:
    """UsageError for what is no number; text is none."""
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        raise UsageError(f"{what} is {value!r}; expected a number")
    return float(value)


def as_interval(ends: Any) -> tuple[float, float] | None:
    """Two numbers, in logsnr; None: everywhere. UsageError."""
    if ends is None:
        return None
    try:
        first, last = ends
    except (TypeError, ValueError):
        raise UsageError(f"the guidance interval is {ends!r}; expected two numbers (LO, HI), in logsnr") from None
    low, high = (as_number("an end of the guidance interval", end) for end in (first, last))
    return None if math.isinf(low) and math.isinf(high) else (low, high)


def check_count(option: str, count: int, most: int | None = None) -> None:
    """UsageError for a count that is not whole, below 1 or above `most`."""
    check_whole(option, count)
    if count < 1:
        raise UsageError(f"{option} is {count}; expected 1 or more")
    if most is not None and count > most:
        raise UsageError(f"{option} is {count}; expected at most {most}")


def parse_counts(option: str, text: str) -> list[int]:
    """`1,2,8` as numbers; UsageError."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise UsageError(f"{option} {text!r}: expected numbers from 1 up, such as 1,2,8")
    return counts
