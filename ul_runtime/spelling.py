"""Samplers and grids as they are typed: a name, or a name with all its numbers, `sa2:0.6`, `mix:0.9,-1,1.5`."""

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias, TypeVar

from ul_runtime.errors import UsageError

T = TypeVar("T")
Ranges: TypeAlias = Mapping[str, Mapping[str, tuple[float, float]]]  # name -> its numbers in order, each with its ends


def parse_spelling(where: str, text: str, known: Mapping[str, Callable[..., T]], ranges: Ranges) -> Callable[..., T]:
    """The function of `known` that `text` names, with the numbers it gives; without numbers, the function's own.

    `where` (sampler, sampling.decoder_grid, ...) begins the message of a UsageError.
    """
    name, colon, numbers = text.partition(":")
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        spellings = ", ".join(_spelling(other, ranges) for other in known)
        raise UsageError(f"{where} {text!r} is not known; expected one of {spellings}{hint}")
    if not colon:
        return known[name]
    ends = ranges.get(name)
    if ends is None:
        raise UsageError(f"{where} {text!r}: {name} takes no numbers; give {name}")
    try:
        values = [float(number) for number in numbers.split(",")]
    except ValueError:
        values = []
    if len(values) != len(ends) or any(
        not low <= value <= high for value, (low, high) in zip(values, ends.values(), strict=True)
    ):
        wanted = ", ".join(f"{number} {low:g} to {high:g}" for number, (low, high) in ends.items())
        raise UsageError(f"{where} {text!r}: expected {name}:{_names(ends)} with {wanted}")
    return partial(known[name], **dict(zip(ends, values, strict=True)))


def _spelling(name: str, ranges: Ranges) -> str:
    return f"{name}[:{_names(ranges[name])}]" if name in ranges else name


def _names(ends: Mapping[str, tuple[float, float]]) -> str:
    return ",".join(number.upper() for number in ends)
