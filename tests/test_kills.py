"""ul-generate killed at each of its file calls, and at random times: every picture there is whole, and a second run of
the command ends with the files of one that was never killed, byte for byte.

The killed process is a fork of one that has imported everything; it kills itself, so that no tracer is needed.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

JOB = """
import itertools, os, random, signal, sys, threading, time
from ul_runtime import jobs, loading, pipeline
from ul_runtime.files import durable
from ul_runtime.backends import ort_cpu
from ul_runtime.cli import generate

class KillingOs:
    # `os` as the files' module sees it: the process ends before or after its n-th call
    def __init__(self, at, after):
        self.numbers, self.at, self.after = itertools.count(1), at, after
    def __getattr__(self, name):
        found = getattr(os, name)
        return self.counted(found) if callable(found) and not isinstance(found, type) else found
    def counted(self, call):
        def run(*arguments, **options):
            chosen = next(self.numbers) == self.at  # counted once, whichever thread calls
            if chosen and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return call(*arguments, **options)
            finally:
                if chosen:
                    os.kill(os.getpid(), signal.SIGKILL)
        return run

def command(out, prepare=lambda: None):
    # exit code of the command in a fork, -9 if it was killed
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        sys.argv = ["ul-generate", *words, "--out", out]
        code = 70
        try:
            prepare()
            generate.main()
        except SystemExit as end:
            code = end.code
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status)

def tree(out):
    names = os.listdir(out) if os.path.isdir(out) else []
    return {name: open(os.path.join(out, name), "rb").read() for name in names}

def check_whole(out):
    for name, data in tree(out).items():
        assert name.startswith(".") or data == reference[name], name

def careless(path, data, **options):
    # as a program writes that does not think of kills
    fd = durable.os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for part in (data[:50], data[50:]):
        durable.os.write(fd, part)
    durable.os.close(fd)

folder, kind, *words = sys.argv[1:]
if kind == "careless":
    durable.atomic_write = careless
assert command(os.path.join(folder, "reference")) == 0
reference = tree(os.path.join(folder, "reference"))
out = os.path.join(folder, "out")
"""

EVERY_CALL = """
def at_call(number, after):
    def prepare():
        durable.os = KillingOs(number, after)
    return prepare
number, killed = 0, -9
while killed == -9:
    number += 1
    fresh = os.path.join(folder, str(number))
    killed = command(fresh, at_call(number, after=number % 2 == 1))
    check_whole(fresh)
    assert command(fresh) == 0, number
    assert tree(fresh) == reference, number
print(number - 1)
"""

RANDOM = """
draw, kills, parts = random.Random(1), 0, 0
def within(limit):
    wait = draw.uniform(0, limit)
    return lambda: threading.Timer(wait, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
began = time.monotonic()
assert command(os.path.join(folder, "timed")) == 0
seconds = time.monotonic() - began
while parts < 3:
    if command(out, within(seconds)) == -9:
        kills += 1
    check_whole(out)
    there = sum(name.endswith(".png") and not name.startswith(".") for name in tree(out))
    if 0 < there < len(reference) - 2:
        parts += 1
    elif there:
        for name in tree(out):
            os.remove(os.path.join(out, name))
    assert kills < 200
assert command(out) == 0
assert tree(out) == reference
print(kills)
"""


def run(code: str, *words: Any) -> int:
    """What the program prints: how often it killed."""
    settings = os.environ | {"OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-c", JOB + code, *map(str, words)]
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=600, env=settings)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


FAST = ("--steps", 1, "--decoder-steps", 1, "--threads", 1, "--backend", "ort-cpu")


@pytest.mark.slow
@pytest.mark.case("G1", "SIGKILL at every file call of ul-generate", "run again, it ends with the same bytes")
def test_a_kill_at_any_file_call_leaves_whole_files_and_the_job_goes_on(analytic_bundle: Path, tmp_path: Path) -> None:
    assert run(EVERY_CALL, tmp_path, "durable", analytic_bundle, "--num-images", 2, *FAST) > 40


@pytest.mark.slow
@pytest.mark.case("G2", "SIGKILL at random times of ul-generate", "the same command ends with the same bytes")
def test_kills_at_random_times_leave_whole_files_and_the_job_goes_on(analytic_bundle: Path, tmp_path: Path) -> None:
    assert run(RANDOM, tmp_path, "durable", analytic_bundle, "--num-images", 40, "--batch-size", 2, *FAST) >= 3


@pytest.mark.slow
def test_the_check_finds_a_file_that_a_kill_has_cut(analytic_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"check_whole|open_image_folder|000000\.png|generate\.json"):
        run(EVERY_CALL, tmp_path, "careless", analytic_bundle, "--num-images", 2, *FAST)
