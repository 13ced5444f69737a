"""Several processes make the images that one makes, and whatever happens to one of them is said."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from exported_run import PLAIN, exported_run

import ul_runtime
from ul_runtime.batches import Images
from ul_runtime.errors import BadInputError, NonFiniteError, StoppedError, ULError
from ul_runtime.progress import UNWATCHED, Control
from ul_runtime.workers import Workers, by_workers

OPTIONS = {"seed": 3, "labels": [1, "none"], "steps": 3, "guidance": 1.5}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_run(PLAIN, tmp_path_factory).bundle


def opened(bundle: Path, count: int = 2) -> list[dict[str, object]]:
    return [{"name": f"worker {n}", "path": bundle, "backend": "ort-cpu", "threads": 1} for n in range(count)]


def by_index(batches: Iterator[Images]) -> dict[int, bytes]:
    return {int(i): x.tobytes() for batch in batches for i, x in zip(batch.indices, batch.x, strict=True)}


def test_two_processes_make_what_one_makes(bundle):
    pipeline = ul_runtime.load(bundle, threads=1)
    expected = by_index(pipeline.generate(7, batch_size=2, **OPTIONS))
    told: list[float] = []
    with by_workers(pipeline, opened(bundle)) as generate:
        for _ in range(2):
            made = by_index(generate(np.arange(7), batch_size=2, control=Control(progress=told.append), **OPTIONS))
            assert made == expected
    assert sum(told) == 14


def test_what_is_not_finite_is_left_out_and_said_after_all_others(bundle):
    pipeline = ul_runtime.load(bundle, threads=1)
    options = OPTIONS | {"guidance": 1e38, "labels": "none"}
    with by_workers(pipeline, opened(bundle, 1)) as generate, pytest.raises(NonFiniteError, match="are not finite"):
        list(generate(np.arange(3), batch_size=2, control=UNWATCHED, **options | {"labels": 1}))


def test_a_process_that_cannot_open_the_bundle_says_why(tmp_path):
    with Workers(opened(tmp_path / "none")) as workers, pytest.raises(BadInputError, match="no such folder"):
        list(workers.generate(np.arange(3), 1, UNWATCHED, **OPTIONS))


def test_a_process_that_is_killed_is_an_error(bundle):
    def kill(_: float) -> None:
        (process,) = workers._processes.values()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)

    with Workers(opened(bundle, 1)) as workers, pytest.raises(ULError, match=r"worker 0 has ended with -9; .* go on"):
        list(workers.generate(np.arange(9), 1, Control(progress=kill), **OPTIONS))


def test_a_stop_ends_all_processes(bundle):
    workers = Workers(opened(bundle))
    processes = []

    def stop() -> bool:
        processes.extend(workers._processes.values())
        return True

    with pytest.raises(StoppedError, match="go on"), workers:
        list(workers.generate(np.arange(9), 1, Control(stop), **OPTIONS))
    assert len(processes) == 2
    assert not any(process.is_alive() for process in processes)
