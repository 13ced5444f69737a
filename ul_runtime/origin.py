"""What a figure was computed with: package versions, the commit of the checkout, the command without its folders."""

import importlib.metadata
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

_ROOT = Path(__file__).parent.parent


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of Python, and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Commit of the checkout that this file lies in, with -dirty if it was changed; None for an installed package."""
    if not (_ROOT / ".git").exists():
        return None
    words = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    except OSError:
        return None
    return done.stdout.strip() or None


def anonymous(program: str, arguments: Sequence[str]) -> str:
    """The command line, of each absolute path only its last part, also behind `=`: no folder of a machine."""
    return f"{program} {shlex.join(map(_anonymous_word, arguments))}"


def _anonymous_word(word: str) -> str:
    option, equals, value = word.rpartition("=")
    return option + equals + (Path(value).name if Path(value).is_absolute() else value)
