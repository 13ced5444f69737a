"""The errors of every command, and the one table of exit codes.

A message says where, what was given, what was expected and what to do, in one line:
`prior.onnx: z has 4 channels, the bundle says 8; export again with ul-export`.
"""

import errno
import re


class ULError(Exception):
    """An error that a user can act on; `exit_code` is what the command returns."""

    exit_code = 70


class DifferentError(ULError):
    """Two things that should be equal were compared, and differ."""

    exit_code = 1


class UsageError(ULError):
    """An option, a configuration or a combination of them that cannot be."""

    exit_code = 2


class BadInputError(ULError):
    """A bundle, checkpoint or data set that is damaged, incomplete or not what it says."""

    exit_code = 65


class OutOfMemoryError(ULError):
    """No memory is left, on this machine or on a device; a smaller batch may fit."""

    exit_code = 71


class OutputError(ULError):
    """The output cannot be written: no space, no permission, other things in the way."""

    exit_code = 74


class StoppedError(ULError):
    """Stopped by a signal; what is committed is whole and the command can be resumed."""

    exit_code = 75


class NonFiniteError(ULError):
    """NaN or Inf where the work cannot go on."""

    exit_code = 76


class UntrustedError(ULError):
    """Input that would have to be trusted to be opened: pickles, links, paths that leave the bundle."""

    exit_code = 77


EXIT_CODES = {
    0: "done",
    1: "compared and different, or installed and broken",
    2: "usage or recipe",
    65: "bad input",
    70: "unforeseen error",
    71: "out of memory",
    74: "output cannot be written",
    75: "stopped by a signal",
    76: "NaN or Inf",
    77: "input that would have to be trusted",
}

_NO_MEMORY = re.compile(
    "out of memory|bad_alloc|CUDA failure 2:|ALLOC_FAILED|[Ff]ailed to allocate|[Uu]nable to allocate"
    "|[Cc]an(?:no|')t allocate memory|can't start new thread|pthread_create|failed to map segment"
    "|PyObject pointer is null|deallocated bytearray object"  # of safetensors
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory, or room for a thread, has run out: libraries tell it in the text alone, often far into it."""
    if error is None or isinstance(error, ULError):
        return isinstance(error, OutOfMemoryError)
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return _NO_MEMORY.search(str(error)) is not None or is_out_of_memory(error.__context__)


# Of a pattern: control characters, other line ends, and what turns the direction of writing.
CONTROLS = r"\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069"
_CONTROLS = re.compile(f"[{CONTROLS}]")


def visible(text: str) -> str:
    """`text` with escapes in place of characters that a terminal would obey, such as those in names from a file."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line(error: object, most: int = 300) -> str:
    """The start of an engine's message."""
    text = visible(" ".join(str(error).split()))
    return text if len(text) <= most else text[:most] + "..."
