"""What a fresh process takes until its first image, measured from inside and outside of it."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ul_runtime.errors import ULError

_LOAD = """
import sys, time
started = time.perf_counter()
import ul_runtime.backends, ul_runtime.bundle, ul_runtime.pipeline
from ul_runtime.startup import report
bundle, backend, precision, threads = sys.argv[1:]
def load():
    pipeline = ul_runtime.load(bundle, backend=backend, precision=precision or None, threads=int(threads))
    return lambda: next(pipeline.generate(1))
report(started, load)
"""
_GENERATE = "from ul_runtime.cli.generate import main; main()"
_TIMEOUT_S = 600.0
_Result = TypeVar("_Result")


def report(started: float, load: Callable[[], Callable[[], object]]) -> None:
    """Print seconds as one JSON line: of imports (since `started`), of `load`, of two calls of what it returns."""
    seconds = {"import_s": time.perf_counter() - started}

    def timed(name: str, call: Callable[[], _Result]) -> _Result:
        start = time.perf_counter()
        result = call()
        seconds[name] = time.perf_counter() - start
        return result

    generate = timed("load_s", load)
    timed("first_image_s", generate)
    timed("next_image_s", generate)
    print(json.dumps({name: round(value, 4) for name, value in seconds.items()}))


def fresh_process(code: str, *arguments: object) -> dict[str, Any]:
    """The figures that `code` prints as its last line, and `process_s`, the whole process. ULError if it fails."""
    start = time.perf_counter()
    words = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        said = " ".join(done.stderr.split())[-300:]
        raise ULError(f"a fresh process for start-up ended with {done.returncode}: {said}")
    return json.loads(done.stdout.splitlines()[-1]) | {"process_s": round(seconds, 3)}


def start_up(bundle: Path, backend: str, precision: str | None, threads: int) -> dict[str, Any]:
    """Seconds of import, load, first and next image, and of `ul-generate -n 1` beyond the next image's."""
    figures = fresh_process(_LOAD, bundle, backend, precision or "", threads)
    options = ["--backend", backend, "--threads", threads, *(["--precision", precision] if precision else [])]
    with tempfile.TemporaryDirectory() as folder:
        whole = fresh_process(_GENERATE, bundle, "--out", f"{folder}/images", "-n", 1, "--json", *options)["process_s"]
    beyond = round(whole - figures["next_image_s"], 3)
    return figures | {"ul_generate_s": whole, "ul_generate_beyond_sampling_s": beyond}
