"""The errors of every command, and the one table of exit codes.

A message says where, what was given, what was expected and what to do, in one line:
`prior.onnx: z has 4 channels, the bundle says 8; export again with ul-export`.
"""

import errno
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any


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


class UntrustedError(ULError):
    """Input that would have to be trusted to be opened: pickles, links, paths that leave the bundle."""

    exit_code = 77


_TYPER_INTERRUPTED = 130  # Ctrl-C while a command's heavy imports ran
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.EACCES, errno.EPERM}


def require_packages(*packages: str, extras: str) -> None:
    """UsageError that says what to install, for the first of `packages` that is not there."""
    for package in packages:
        if find_spec(package) is None:
            raise UsageError(f"{package} is not installed; pip install 'unified-latents[{extras}]'")


def run_command(app: Callable[..., Any], name: str) -> None:
    """Run a typer app; end the process with the exit code of the table, errors as one line on stderr."""
    try:
        app()
    except ULError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(StoppedError.exit_code)
    except SystemExit as ended:
        if ended.code != _TYPER_INTERRUPTED:
            raise
        print(f"{name}: interrupted before any work", file=sys.stderr)
        sys.exit(StoppedError.exit_code)
    except BrokenPipeError:
        sys.exit(OutputError.exit_code)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        print(
            f"{name}: {error.filename or 'output'}: {error.strerror}; free space or fix permissions",
            file=sys.stderr,
        )
        sys.exit(OutputError.exit_code)
