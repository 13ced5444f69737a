"""ul-doctor: what can run on this machine, and what to do about the rest."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ul_runtime.cli.command import run_command
from ul_runtime.cli.options import AsJson, with_options
from ul_runtime.errors import ULError

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
_SIGNS = {True: "yes", False: "NO", None: "-"}


@app.command(epilog="Example: ul-doctor")
@with_options
def doctor(
    engines: Annotated[
        Path | None,
        typer.Option("--engines", metavar="DIR", help="Where engines are kept.", show_default="the user's cache"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Try every backend and library here; exit code 1 if something that is installed does not work."""
    from ul_runtime.backends.tensorrt_engines import EngineCache
    from ul_runtime.cli.examine import examine
    from ul_runtime.machine import engine_dir

    findings = []
    for finding in examine(EngineCache(engine_dir(engines))):
        findings.append(finding)
        if not as_json:
            print(f"{_SIGNS[finding.works]:>4}  {finding.what:<18}{finding.says}")
            if finding.advice and finding.works is not True:
                print(f"{'':>24}-> {finding.advice}")
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
    broken = [finding.what for finding in findings if finding.works is False]
    if broken:
        raise BrokenError(f"does not work here: {', '.join(broken)}")


class BrokenError(ULError):
    """Something that is installed does not work."""

    exit_code = 1


def main() -> None:
    """Entry point of ul-doctor."""
    run_command(app, "ul-doctor")
