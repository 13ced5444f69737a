"""Threads by the load of the machine: one fewer for each core that others use, one more when it stays free."""

import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from ul_runtime import threads
from ul_runtime.threads import FreeCores, cores


class Machine:
    """A clock, and what other programs have used by it."""

    def __init__(self, most: int, hardware: int | None = None) -> None:
        self.now, self.used = 100.0, 7.0
        self.cores = FreeCores(most, lambda: self.used, lambda: self.now)
        self.cores._all = hardware or most

    def second(self, busy: float, took: float = 1.0) -> int:
        """Threads after so many seconds in which others used `busy` cores."""
        self.now += took
        self.used += busy * took
        return self.cores.threads()


@pytest.mark.case(
    "N1", "training, export and sampling beside a program that keeps one of two cores busy",
    "one thread fewer computes for each busy core, one more once it stays free; one line says so",
)  # fmt: skip
def test_a_busy_core_takes_a_thread_away_and_a_free_one_gives_it_back() -> None:
    machine = Machine(2)
    assert machine.cores.threads() == 2
    assert machine.second(busy=0.0) == 2
    assert machine.second(busy=0.67) == 1  # what one loop gets beside two threads
    assert [machine.second(busy=1.0) for _ in range(3)] == [1, 1, 1]
    assert [machine.second(busy=0.0) for _ in range(5)] == [1, 1, 1, 1, 2]


def test_little_load_takes_nothing_and_a_pause_of_others_gives_nothing() -> None:
    machine = Machine(2)
    assert [machine.second(busy=0.4) for _ in range(20)] == [2] * 20
    assert machine.second(busy=1.0) == 1
    assert [machine.second(busy=busy) for busy in (0, 0, 0, 0, 1) * 3] == [1] * 15


def test_one_thread_always_computes() -> None:
    machine = Machine(4)
    assert machine.second(busy=3.9) == 1
    assert machine.second(busy=40.0) == 1
    assert Machine(1).second(busy=1.0) == 1


def test_of_many_cores_only_the_busy_ones_are_left_to_others() -> None:
    assert Machine(16).second(busy=3.1) == 13
    assert Machine(16, hardware=32).second(busy=3.1) == 16  # hardware threads are left for them


def test_long_steps_are_one_look_each_and_short_ones_wait_for_a_second() -> None:
    machine = Machine(2)
    assert machine.second(busy=1.0, took=0.5) == 2  # not yet
    assert machine.second(busy=1.0, took=0.5) == 1
    assert machine.second(busy=0.0, took=16.0) == 2
    assert machine.second(busy=1.0, took=16.0) == 1


def test_a_system_that_does_not_say_keeps_all_threads() -> None:
    free = FreeCores(2, lambda: None, iter(range(0, 1000, 2)).__next__)
    assert [free.threads() for _ in range(10)] == [2] * 10


def test_a_line_says_what_changed(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(2)
    with caplog.at_level(logging.INFO):
        machine.second(busy=0.8)
    (line,) = caplog.messages
    assert line == "other programs use 0.8 of 2 cores: 1 thread from here; --threads fixes it"


def test_callers_at_once_make_one_look() -> None:
    machine = Machine(2)
    machine.now, machine.used = machine.now + 1.0, machine.used + 1.0
    barrier, seen = threading.Barrier(8), []

    def call() -> None:
        barrier.wait()
        seen.append(machine.cores.threads())

    workers = [threading.Thread(target=call) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert seen == [1] * 8


@pytest.mark.parametrize(
    ("given", "quota", "expected"), [("1", "max 100000", 1), ("", "100000 100000", 1), ("", "50000 100000", 1)]
)
def test_cores_are_bounded_by_the_variable_and_the_quota(
    given: str, quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.setattr(threads, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(threads, "_allowed", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(threads, "_siblings", str)
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert cores() == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "nonsense")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cores() == 4


def test_hardware_threads_of_a_core_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "_allowed", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(threads, "_siblings", lambda cpu: str(cpu % 2))
    assert cores() == 2


def test_what_others_use_is_read_of_this_machine_without_what_this_process_uses() -> None:
    """A loop in this process is not seen; the same loop in another process is."""
    if not Path("/proc/stat").exists():
        pytest.skip("this system does not say")
    loop = "import time\nend = time.process_time() + 1.0\nwhile time.process_time() < end: pass\nprint(1)"
    before = threads._cpu_seconds_of_others()
    subprocess.run([sys.executable, "-S", "-c", loop], check=True, capture_output=True)
    by_other = threads._cpu_seconds_of_others() - before
    assert by_other > 0.9
    usage, started = os.times(), threads._cpu_seconds_of_others()
    exec(loop.replace("print(1)", ""), {})
    own = sum(os.times()[:2]) - sum(usage[:2])
    assert own > 0.9
    everything = threads._cpu_seconds_of_others() + own - started
    assert everything > 0.9  # it was seen, and taken off


def test_onnx_runtime_loads_its_graphs_anew_for_another_number(
    analytic_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ul_runtime.backends import ort_cpu
    from ul_runtime.loading import load

    now = [2]
    monkeypatch.setattr(ort_cpu, "free_threads", lambda: now[0])
    pipeline = load(analytic_bundle, backend="ort-cpu")
    first = next(pipeline.generate(2, seed=3, steps=2)).images
    held = {name: entry[0] for name, entry in pipeline.backend._sessions.items()}
    assert set(held.values()) == {2}
    now[0] = 1
    again = next(pipeline.generate(2, seed=3, steps=2)).images
    assert {entry[0] for entry in pipeline.backend._sessions.values()} == {1}
    np.testing.assert_array_equal(first, again)
    fixed = load(analytic_bundle, backend="ort-cpu", threads=2)
    next(fixed.generate(1, steps=1))
    assert {entry[0] for entry in fixed.backend._sessions.values()} == {2}


def test_torch_follows_the_load_unless_a_number_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from ul_train import torch_backend

    before, now = torch.get_num_threads(), [2]
    monkeypatch.setattr(torch_backend, "free_threads", lambda: now[0])
    monkeypatch.setattr(torch_backend, "_fixed_threads", None)
    try:
        torch_backend.fix_threads(None)
        assert torch.get_num_threads() == 2
        now[0] = 1
        assert torch_backend.follow_load() == torch.get_num_threads() == 1
        torch_backend.fix_threads(2)
        assert torch_backend.follow_load() == torch.get_num_threads() == 2
    finally:
        torch_backend.fix_threads(None)
        torch.set_num_threads(before)


def test_the_log_has_the_threads_of_each_line(finished: Path) -> None:
    lines = (finished / "log.jsonl").read_text().splitlines()
    training = [line for line in lines if '"loss"' in line]
    assert training
    assert all(re.search(r'"threads": 1\.0\b', line) for line in training)
