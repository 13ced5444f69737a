"""A field of a dataclass that commands offer as an option; ul_runtime.cli.options.with_options expands it."""

import dataclasses
from typing import Any


def option(
    default: Any,
    help: str,
    *names: str,
    metavar: str | None = None,
    shown: str | bool = True,
    min: int | None = None,
) -> Any:
    """A field of a dataclass of options. `names` default to the field's own; `shown` is the default as help says it."""
    metadata = {"option": {"names": names, "help": help, "metavar": metavar, "show_default": shown, "min": min}}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
