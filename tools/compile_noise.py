#!/usr/bin/env python
"""ul_runtime/backends/noise.cu to noise.ptx, by nvcc: only needed when noise.cu has changed.

    python tools/compile_noise.py

PTX is text that every driver compiles for its GPU. It is written for the oldest GPU (sm75) and the oldest language
version (7.0) that have what it uses, so that drivers of CUDA 12 take what a compiler of CUDA 13 made.
"""

import hashlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from ul_runtime.backends.gpu import PTX_FILE, SOURCE_FILE
from ul_runtime.cli.command import run_command
from ul_runtime.errors import UsageError
from ul_runtime.files import durable

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
ARCHITECTURE, LANGUAGE = "compute_75", "7.0"


@app.command()
def compile_noise(
    nvcc: Annotated[str, typer.Option(metavar="FILE", help="CUDA's compiler.")] = "nvcc",
) -> None:
    """Compile, and write noise.ptx beside its source."""
    durable.atomic_write(PTX_FILE, compiled(nvcc).encode())
    print(PTX_FILE)


def compiled(nvcc: str) -> str:
    """The PTX, which begins with the SHA-256 of its source. UsageError: no compiler, or it fails."""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "noise.ptx"
        words = [nvcc, "-ptx", f"-arch={ARCHITECTURE}", "-fmad=false", "-O3", "-o", str(ptx), str(SOURCE_FILE)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        except OSError as error:
            raise UsageError(f"{nvcc}: {error.strerror}; install CUDA's compiler, or name it by --nvcc") from error
        if done.returncode:
            raise UsageError(f"{nvcc} failed: {' '.join(done.stderr.split())[:400]}")
        text = ptx.read_text()
    body = re.sub(r"\A(//.*\n|\n)*\.version \S+", f".version {LANGUAGE}", text)
    digest = hashlib.sha256(SOURCE_FILE.read_bytes()).hexdigest()
    return f"// made of noise.cu, SHA-256 {digest}, by tools/compile_noise.py\n{body}"


def main() -> None:
    """Console script."""
    run_command(app, "compile_noise")


if __name__ == "__main__":
    main()
