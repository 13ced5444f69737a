"""Several processes make the images that one makes, and whatever happens to one of them is said."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from exported_run import PLAIN, exported_run

import ul_runtime
from ul_runtime.batches import Images
from ul_runtime.errors import BadInputError, NonFiniteError, StoppedError, ULError
from ul_runtime.machine import MachineOptions
from ul_runtime.workers import Opened, Workers

OPTIONS = {"seed": 3, "labels": ["#1", "none"], "steps": 3, "guidance": 1.5}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_run(PLAIN, tmp_path_factory).bundle


def opened(bundle: Path, count: int = 2) -> dict[str, Opened]:
    options = MachineOptions("ort-cpu", threads=1)
    return {f"worker {n}": (bundle, options, None) for n in range(count)}


def by_index(batches: Iterator[Images]) -> dict[int, bytes]:
    return {int(i): x.tobytes() for batch in batches for i, x in zip(batch.indices, batch.x, strict=True)}


def test_two_processes_make_what_one_makes(bundle):
    pipeline = ul_runtime.load(bundle, threads=1)
    expected = by_index(pipeline.generate(7, batch_size=2, **OPTIONS))
    told: list[float] = []
    with Workers(pipeline, opened(bundle)) as workers:
        for _ in range(2):
            made = by_index(workers.generate(np.arange(7), batch_size=2, tick=told.append, **OPTIONS))
            assert made == expected
    assert sum(told) == 14


def test_what_is_not_finite_is_left_out_and_said_after_all_others(bundle):
    pipeline = ul_runtime.load(bundle, threads=1)
    options = OPTIONS | {"guidance": 1e38, "labels": "#1"}
    with Workers(pipeline, opened(bundle, 1)) as workers, pytest.raises(NonFiniteError, match="are not finite"):
        list(workers.generate(3, batch_size=2, **options))


def test_a_process_that_cannot_open_the_bundle_says_why(bundle, tmp_path):
    pipeline = ul_runtime.load(bundle, threads=1)
    with Workers(pipeline, opened(tmp_path / "none")) as workers, pytest.raises(BadInputError, match="no such folder"):
        list(workers.generate(3, batch_size=1, **OPTIONS))


@pytest.mark.case("G3", "one of several sampling processes killed", "the job ends with an error and can be continued")
def test_a_process_that_is_killed_is_an_error(bundle):
    def kill(amount: float) -> None:
        if not amount:
            return
        (process,) = workers._processes.values()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)

    pipeline = ul_runtime.load(bundle, threads=1)
    with (
        Workers(pipeline, opened(bundle, 1)) as workers,
        pytest.raises(ULError, match=r"worker 0 has ended with -9; .* go on"),
    ):
        list(workers.generate(9, batch_size=1, tick=kill, **OPTIONS))


def test_a_stop_ends_all_processes(bundle):
    workers = Workers(ul_runtime.load(bundle, threads=1), opened(bundle))
    processes = []

    def stop(amount: float) -> None:
        processes.extend(workers._processes.values())
        raise StoppedError("stopped")

    with pytest.raises(StoppedError, match="stopped"), workers:
        list(workers.generate(9, batch_size=1, tick=stop, **OPTIONS))
    assert len(processes) == 2
    assert not any(process.is_alive() for process in processes)


PARENT = """
import os, sys, time
from pathlib import Path
from ul_runtime.machine import MachineOptions
from ul_runtime.workers import Workers
if __name__ == "__main__":
    options = MachineOptions("ort-cpu", threads=1)
    with Workers(None, {str(n): (Path(sys.argv[1]), options, None) for n in range(2)}) as workers:
        print(*(process.pid for process in workers._processes.values()), flush=True)
        time.sleep(60)
"""


def test_processes_end_when_their_parent_is_killed(bundle, tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    words = [sys.executable, str(tmp_path / "parent.py"), str(bundle)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [int(word) for word in parent.stdout.readline().split()]
        assert len(workers) == 2
        assert all(is_alive(worker) for worker in workers)
        parent.kill()
    deadline = time.monotonic() + 30
    while any(is_alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_alive(worker) for worker in workers)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
