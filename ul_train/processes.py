"""Commands of the toolkit as processes of their own."""

import subprocess
import sys
from collections.abc import Mapping, Sequence

from ul_runtime.errors import StoppedError
from ul_runtime.signals import stop_on_signal


def option_words(given: Mapping[str, object]) -> list[str]:
    """The options that are given, and their values, as words of a command."""
    return [str(word) for name, value in given.items() if value is not None for word in (name, value)]


def run_main(module: str, *words: str, name: str | None = None) -> str:
    """`main` of a module as a command in a process of its own, said on stderr as `name`; see run_to_end."""
    print(name or module, *words, file=sys.stderr, flush=True)
    return run_to_end([sys.executable, "-c", f"from {module} import main; main()", *words])


def run_to_end(program: Sequence[str]) -> str:
    """stdout of a command in a process of its own, whose progress goes to stderr; ends this one with its exit code.

    A signal is left to the command, which saves what it has; then StoppedError.
    """
    with stop_on_signal() as stop, subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        said, _ = process.communicate()
        stopped = stop()
    if stopped or process.returncode == StoppedError.exit_code:
        raise StoppedError("stopped; run the same command again to go on")
    if process.returncode:
        sys.exit(process.returncode)  # it has said why
    return said
