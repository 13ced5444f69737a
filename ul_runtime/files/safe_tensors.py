"""A safetensors file from others: its errors, and what must not be taken for one."""

from collections.abc import Iterator
from contextlib import contextmanager

from ul_runtime.errors import BadInputError, UntrustedError, one_line

MAX_HEADER = 2**22  # bytes: tens of thousands of tensors


@contextmanager
def reading_safetensors(data: bytes, where: str, advice: str) -> Iterator[None]:
    """While its tensors are read: UntrustedError for a pickle or zip, BadInputError for any other damage."""
    from safetensors import SafetensorError

    if data[:4] == b"PK\x03\x04" or (data[:1] == b"\x80" and data[8:9] != b"{"):
        raise UntrustedError(f"{where}: a pickle or zip, not safetensors; it can run code and is not opened")
    if (size := int.from_bytes(data[:8], "little")) > MAX_HEADER:
        raise BadInputError(
            f"{where}: not a safetensors file: its header has {size} bytes, at most {MAX_HEADER}; {advice}"
        )
    try:
        yield
    except (SafetensorError, ValueError, OverflowError, KeyError, TypeError) as error:  # what it and its loaders raise
        raise BadInputError(f"{where}: not a safetensors file: {one_line(error)}; {advice}") from error
