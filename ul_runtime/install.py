"""How to install what is missing, from where this package came: no name that anybody could take on an index."""

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ul_runtime.errors import UsageError

_PACKAGE = "unified-latents"
_CHECKOUT = Path(__file__).parent.parent
_WITH_TORCH = {"train", "export", "eval", "quickstart"}
_SMALL_TORCH = "; without an NVIDIA GPU, first install torch's CPU build by the command on pytorch.org/get-started"


def install(*extras: str) -> str:
    """The command that installs these extras of this package."""
    wanted = ",".join(extras)
    small = _SMALL_TORCH if _WITH_TORCH & set(wanted.split(",")) and find_spec("torch") is None else ""
    return _command(f"[{wanted}]" if wanted else "") + small


def _command(extras: str) -> str:
    """What pip was given: the checkout, or a folder, file or repository; the folder of its source if unknown."""
    if (_CHECKOUT / "pyproject.toml").is_file():
        return _pip(("." if Path.cwd() == _CHECKOUT else str(_CHECKOUT)) + extras)
    try:
        source = json.loads(distribution(_PACKAGE).read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        source = {}
    url = source.get("url", "")
    if url.startswith("file://"):
        return _pip(unquote(urlsplit(url).path) + extras)
    if url:
        vcs = source.get("vcs_info")
        return _pip(f"{_PACKAGE}{extras} @ " + (f"{vcs['vcs']}+{url}@{vcs['commit_id']}" if vcs else url))
    return _pip(f".{extras}") + " in the folder of its source"


def _pip(what: str) -> str:
    return f"pip install {shlex.quote(what)}"


def require_packages(*packages: str, extras: str) -> None:
    """UsageError that says what to install, for the first of `packages` that is not there."""
    for package in packages:
        if find_spec(package) is None:
            raise UsageError(f"{package} is not installed; {install(extras)}")
