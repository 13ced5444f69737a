"""Small JSON files that are read again: an object of known fields, whatever lies in the file."""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ul_runtime.manifest import first_error

MAX_BYTES = 2**24
Known = TypeVar("Known")


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file. FileNotFoundError; ValueError: a pipe or folder, too large, or no object."""
    if path.exists() and not path.is_file():
        raise ValueError("a pipe, device or folder")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    return parse_object(data)


def read_if_whole(path: Path) -> dict[str, Any] | None:
    """The object in a file that can be made again; None: it is missing or damaged."""
    try:
        return read_object(path)
    except (FileNotFoundError, ValueError):
        return None


def parse_object(data: bytes) -> dict[str, Any]:
    """The object in these bytes. ValueError."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes")
    try:
        found = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found


def checked(kind: type[Known], fields: dict[str, Any]) -> Known:
    """These fields as a dataclass, of exactly its types. ValueError."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(fields), strict=True)
    except ValidationError as error:
        raise ValueError(first_error(error)) from None
