"""The errors of every command, and the one table of exit codes.

A message says where, what was given, what was expected and what to do, in one line:
`prior.onnx: z has 4 channels, the bundle says 8; export again with ul-export`.
"""

import errno
import io
import logging
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from types import TracebackType
from typing import Any, NoReturn


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


class OutputError(ULError):
    """The output cannot be written: no space, no permission, other things in the way."""

    exit_code = 74


class StoppedError(ULError):
    """Stopped by a signal; what is committed is whole and the command can be resumed."""

    exit_code = 75


class NonFiniteError(ULError):
    """NaN or Inf where the work cannot go on."""

    exit_code = 76


class OutOfMemoryError(ULError):
    """A device has no memory left for a batch; a smaller one may fit."""

    exit_code = 71


class UntrustedError(ULError):
    """Input that would have to be trusted to be opened: pickles, links, paths that leave the bundle."""

    exit_code = 77


_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.EACCES, errno.EPERM}


def one_line(error: object, most: int = 300) -> str:
    """The start of an engine's message."""
    text = " ".join(str(error).split())
    return text if len(text) <= most else text[:most] + "..."


def require_packages(*packages: str, extras: str) -> None:
    """UsageError that says what to install, for the first of `packages` that is not there."""
    for package in packages:
        if find_spec(package) is None:
            raise UsageError(f"{package} is not installed; pip install 'unified-latents[{extras}]'")


class _Lines(logging.Handler):
    """What the packages log, each message one line on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def _log_to_stderr() -> None:
    """Messages of INFO and above of our packages go to stderr as they are; once, however often it is called."""
    for package in ("ul_runtime", "ul_train", "ul_export"):
        logger = logging.getLogger(package)
        if not any(isinstance(handler, _Lines) for handler in logger.handlers):
            logger.addHandler(_Lines())
        logger.setLevel(logging.INFO)


def _end_with_70(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> NoReturn:
    """The excepthook of a command: 1, which Python would end with, means that two things differ."""
    sys.__excepthook__(kind, error, trace)
    raise SystemExit(ULError.exit_code)


def run_command(app: Callable[..., Any], name: str) -> NoReturn:
    """Run a typer app and end the process with the exit code of the table, any error as one line on stderr.

    An error that nobody foresaw keeps its traceback and ends with 70. SIGTERM unwinds as Ctrl-C does, so that
    temporary files are removed; `progress.stop_on_signal` stops more gently.
    """
    import typer

    _log_to_stderr()
    misuse: type[Exception] = typer.BadParameter.__mro__[2]  # ClickException: typer keeps click to itself
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.excepthook = _end_with_70
    command = typer.main.get_command(app)  # type: ignore[arg-type]
    try:
        # not command.main(), which ends with 1 where a pipe is closed
        with suppress(typer.Exit), command.make_context(name, sys.argv[1:]) as context:
            command.invoke(context)
        sys.stdout.flush()
    except misuse as error:
        message: str = error.format_message()  # type: ignore[attr-defined]
        fail(name, UsageError(f"{' '.join(message.split()).removesuffix('.')}; see {name} --help"))
    except ULError as error:
        fail(name, error)
    except KeyboardInterrupt:
        fail(name, StoppedError("interrupted"))
    except BrokenPipeError:
        sys.stdout = sys.stderr = io.StringIO()  # or Python flushes the old ones, and ends with 120
        sys.exit(OutputError.exit_code)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        fail(name, OutputError(f"{error.filename or 'output'}: {error.strerror}; free space or fix permissions"))
    sys.exit(0)


def fail(name: str, error: ULError) -> NoReturn:
    """Print the error as one line, and end the process with its exit code."""
    print(f"{name}: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
