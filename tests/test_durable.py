"""Durable writes: power loss, failing calls, full disks, short writes, kills, locks."""

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from disk import Disk
from power_loss import RecordingDisk, Tree, violations

from ul_runtime.errors import OutputError, UsageError
from ul_runtime.files import durable

OLD, NEW = b"old" * 1000, b"new!" * 2000


def fill(directory: Path) -> None:
    durable.write_file(directory / "a", [NEW[:5000], NEW[5000:]])
    durable.make_directory(directory / "sub")
    durable.write_file(directory / "sub" / "b", [b"second"])


NEW_TREE: Tree = {"a": NEW, "sub": {"b": b"second"}}


def write_over_file(root: Path) -> None:
    durable.atomic_write(root / "target", NEW)


def write_new_file(root: Path) -> None:
    durable.atomic_write(root / "target", NEW, overwrite=False)


def commit(root: Path) -> None:
    with durable.temporary_directory_beside(root / "target") as temporary:
        fill(temporary)
        durable.commit_directory(temporary, root / "target")


def replace(root: Path) -> None:
    with durable.temporary_directory_beside(root / "target") as temporary:
        fill(temporary)
        durable.replace_directory(temporary, root / "target")


def old_file(root: Path) -> None:
    (root / "target").write_bytes(OLD)


def old_directory(root: Path) -> None:
    (root / "target").mkdir()
    (root / "target" / "a").write_bytes(OLD)


CASES: dict[str, tuple[Callable[[Path], None], Callable[[Path], None], bytes | Tree]] = {
    "atomic_write, new": (lambda root: None, write_over_file, NEW),
    "atomic_write, over a file": (old_file, write_over_file, NEW),
    "atomic_write, to a free name": (lambda root: None, write_new_file, NEW),
    "commit_directory": (lambda root: None, commit, NEW_TREE),
    "replace_directory": (old_directory, replace, NEW_TREE),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.case("C2", "a power loss that drops all that was not flushed, at any call", "old or new, whole")
def test_a_power_loss_at_any_call_leaves_old_or_new_whole(tmp_path: Path, case: str) -> None:
    prepare, act, new = CASES[case]
    prepare(tmp_path)
    assert violations(tmp_path, lambda: act(tmp_path), new, RecordingDisk()) == []


@pytest.mark.parametrize("skipped", ["file", "directory"])
@pytest.mark.parametrize("case", CASES)
def test_the_power_loss_check_finds_a_missing_fsync(tmp_path: Path, case: str, skipped: str) -> None:
    prepare, act, new = CASES[case]
    prepare(tmp_path)
    assert violations(tmp_path, lambda: act(tmp_path), new, RecordingDisk(skipped)) != []


class FailingDisk(Disk):
    """The k-th call that changes something fails."""

    def __init__(self, fail_at: int, code: int) -> None:
        self.calls_left, self.code, self.failed = fail_at, code, False

    def _count(self) -> None:
        self.calls_left -= 1
        if self.calls_left == 0:
            self.failed = True
            raise OSError(self.code, os.strerror(self.code))

    def create(self, path: Path) -> int:
        self._count()
        return super().create(path)

    def write(self, fd: int, data: memoryview) -> int:
        self._count()
        return super().write(fd, data)

    def sync(self, fd: int) -> None:
        self._count()

    def close(self, fd: int) -> None:
        super().close(fd)
        self._count()

    def make_directory(self, path: Path) -> None:
        self._count()
        super().make_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        self._count()
        super().rename(source, target)

    def rename_to_free(self, source: Path, target: Path) -> None:
        self._count()
        super().rename_to_free(source, target)

    def exchange(self, a: Path, b: Path) -> None:
        self._count()
        super().exchange(a, b)


def contents(path: Path) -> "bytes | Tree":
    if path.is_dir():
        return {entry.name: contents(entry) for entry in path.iterdir()}
    return path.read_bytes()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("case", CASES)
def test_a_failure_of_any_call_is_an_output_error_and_leaves_no_trace(tmp_path: Path, case: str, code: int) -> None:
    prepare, act, new = CASES[case]
    for fail_at in range(1, 100):
        root = tmp_path / str(fail_at)
        root.mkdir()
        prepare(root)
        old = contents(root)
        if not disk_reached(FailingDisk(fail_at, code), act, root):
            assert contents(root) == {"target": new}
            return
        assert contents(root) in (old, {"target": new})
    pytest.fail("never got through")


def disk_reached(disk: FailingDisk, act: Callable[[Path], None], root: Path) -> bool:
    """Run `act`; whether the planted failure was met (it must then be an OutputError that names the target)."""
    reported = ""
    try:
        with disk.in_use():
            act(root)
    except OutputError as error:
        reported = str(error)
    assert (str(root) in reported and os.strerror(disk.code) in reported) == disk.failed
    return disk.failed


def run_python(code: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.case("C4", "writes that the system cuts short", "written whole, or exit code 74 and the old file")
def test_a_file_size_limit_gives_an_output_error_and_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(OLD)
    code = """
import resource, sys
from pathlib import Path
from ul_runtime.files import durable
from ul_runtime.errors import OutputError
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
root = Path(sys.argv[1])
for act in (lambda: durable.atomic_write(root / "target", bytes(100_000)),
            lambda: durable.append_line(root / "log", "x" * 100_000)):
    try:
        act()
    except OutputError as error:
        print(error)
"""
    (tmp_path / "log").write_bytes(b"line\n")
    done = run_python(code, tmp_path)
    assert done.stdout.count("ulimit -f") == 2, done
    assert contents(tmp_path) == {"target": OLD, "log": b"line\n"}


def test_append_line_ends_a_half_line_first(tmp_path: Path) -> None:
    path = tmp_path / "log"
    durable.append_line(path, "one", sync=True)
    path.write_bytes(path.read_bytes() + b'{"torn')
    durable.append_line(path, "two")
    assert path.read_text().splitlines() == ["one", '{"torn', "two"]
    with pytest.raises(ValueError, match="one line"):
        durable.append_line(path, "a\nb")


@pytest.mark.parametrize("there", ["file", "folder", "link to nowhere"])
def test_a_write_that_may_not_overwrite_leaves_whatever_has_the_name(tmp_path: Path, there: str) -> None:
    target = tmp_path / "target"
    if there == "file":
        target.write_bytes(OLD)
    elif there == "folder":
        target.mkdir()
    else:
        target.symlink_to("nowhere")
    before = os.lstat(target)
    with pytest.raises(UsageError, match="exists already"):
        durable.atomic_write(target, NEW, overwrite=False)
    assert os.lstat(target) == before
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("there", ["file", "full directory", "link"])
def test_commit_refuses_a_name_that_is_taken(tmp_path: Path, there: str) -> None:
    target = tmp_path / "target"
    if there == "file":
        target.write_bytes(OLD)
    elif there == "link":
        target.symlink_to(tmp_path / "nowhere")
    else:
        old_directory(tmp_path)
    with pytest.raises(UsageError, match="exists already"):
        commit(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_commit_takes_the_place_of_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    commit(tmp_path)
    assert contents(tmp_path) == {"target": NEW_TREE}


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_commit_refuses_a_tree_with_links_or_pipes(tmp_path: Path, kind: str) -> None:
    def act() -> None:
        with durable.temporary_directory_beside(tmp_path / "target") as temporary:
            if kind == "link":
                (temporary / "a").symlink_to("/etc/hostname")
            else:
                os.mkfifo(temporary / "a")
            durable.commit_directory(temporary, tmp_path / "target")

    with pytest.raises(OutputError):
        act()
    assert list(tmp_path.iterdir()) == []


@contextmanager
def child(code: str, *arguments: object) -> Iterator["subprocess.Popen[str]"]:
    """A Python process that has printed its first line, killed at the end."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.send_signal(signal.SIGKILL)


HOLD = """
import sys, time
from pathlib import Path
from ul_runtime.files import durable
with durable.{what}(Path(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_sweep_removes_the_dead_and_leaves_the_living_and_the_others(tmp_path: Path) -> None:
    target = tmp_path / "target"
    first = child(HOLD.format(what="temporary_directory_beside"), target)
    with first, durable.temporary_directory_beside(target) as living:
        dead = next(path for path in tmp_path.iterdir() if path != living)
        assert durable.sweep(tmp_path, "target") == []
    (tmp_path / ".target.0123456789abcdef.tmp").write_bytes(b"half")
    others = [".target2.0123456789abcdef.tmp", ".target.tmp", "target"]
    for name in others:
        (tmp_path / name).write_bytes(b"")
    assert durable.sweep(tmp_path, "target") == sorted([dead.name, ".target.0123456789abcdef.tmp"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
    with durable.temporary_directory_beside(target):
        assert durable.sweep(tmp_path) == [".target2.0123456789abcdef.tmp"]


def test_a_second_holder_of_a_directory_is_told_who_has_it_until_the_first_dies(tmp_path: Path) -> None:
    def claim() -> None:
        with durable.lock_directory(tmp_path):
            pass

    first = child(HOLD.format(what="lock_directory"), tmp_path)
    with first as process, pytest.raises(UsageError, match=f"in use by pid {process.pid} on "):
        claim()
    assert (tmp_path / durable.LOCK_NAME).exists()
    claim()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_cannot_be_locked_twice_in_one_process(tmp_path: Path) -> None:
    with durable.lock_directory(tmp_path), pytest.raises(UsageError, match=f"in use by pid {os.getpid()} "):
        durable.lock_directory(tmp_path).__enter__()


@pytest.mark.parametrize("content", [b"mine\n", b"pid of another program", b"pid 7 on host\nand more\n"])
def test_a_file_of_another_program_with_the_name_of_a_lock_is_left_alone(tmp_path: Path, content: bytes) -> None:
    lock = tmp_path / durable.LOCK_NAME
    lock.write_bytes(content)
    for _ in range(2):
        with pytest.raises(UsageError, match=r"\.lock: was not written by this toolkit"):
            durable.lock_directory(tmp_path).__enter__()
    assert lock.read_bytes() == content


def test_another_name_of_a_file_elsewhere_is_not_taken_for_a_lock(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    os.link(tmp_path / "mine", tmp_path / "folder" / durable.LOCK_NAME)
    with pytest.raises(UsageError, match="was not written by this toolkit"):
        durable.lock_directory(tmp_path / "folder").__enter__()
    assert contents(tmp_path) == {"mine": b"", "folder": {durable.LOCK_NAME: b""}}


@pytest.mark.parametrize("content", [b"", b"pid 999999 on some host\n"])
def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path, content: bytes) -> None:
    (tmp_path / durable.LOCK_NAME).write_bytes(content)
    with durable.lock_directory(tmp_path):
        assert (tmp_path / durable.LOCK_NAME).read_text().startswith(f"pid {os.getpid()} on ")
    assert list(tmp_path.iterdir()) == []


def test_an_output_directory_must_be_missing_empty_or_hold_only_what_is_allowed(tmp_path: Path) -> None:
    durable.check_output_directory(tmp_path / "missing" / "deeper")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "image-1.png").write_bytes(b"")
    (tmp_path / ".image-2.png.0123456789abcdef.tmp").write_bytes(b"")
    durable.check_output_directory(tmp_path, ["image-*.png"])
    with pytest.raises(UsageError, match=r"holds other things \(image-1\.png\)"):
        durable.check_output_directory(tmp_path, ["*.npz"])
    with pytest.raises(UsageError, match="is a file"):
        durable.check_output_directory(tmp_path / "image-1.png")


@pytest.mark.case("A16")
def test_what_a_killed_check_of_a_folder_left_is_swept_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".probe.0123456789abcdef.tmp").write_bytes(b"")
    durable.check_output_directory(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.case("A16")
def test_an_error_of_a_write_names_the_file_and_not_its_temporary_name(tmp_path: Path) -> None:
    with FailingDisk(1, errno.ENOSPC).in_use(), pytest.raises(OutputError) as caught:
        durable.atomic_write(tmp_path / "000003.png", NEW)
    assert str(caught.value).startswith(f"{tmp_path / '000003.png'}: cannot write: No space left on device")


def test_an_output_directory_that_cannot_be_written_is_refused_with_advice(tmp_path: Path) -> None:
    with FailingDisk(1, errno.EROFS).in_use(), pytest.raises(OutputError, match=r"Read-only.*writable disk"):
        durable.check_output_directory(tmp_path / "missing")


def test_an_output_directory_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError):
        durable.check_output_directory(tmp_path / "file" / "out")
    with pytest.raises(OutputError):
        durable.make_directory(tmp_path / "file" / "out")


def test_a_file_is_written_below_a_directory_that_is_reached_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    durable.atomic_write(tmp_path / "runs" / "report.json", b"{}")
    with (
        durable.lock_directory(tmp_path / "runs"),
        durable.temporary_directory_beside(tmp_path / "runs" / "a") as temporary,
    ):
        durable.append_line(tmp_path / "runs" / "log", "line", sync=True)
        durable.commit_directory(temporary, tmp_path / "runs" / "a")
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["a", "log", "report.json"]


def test_an_error_inside_a_temporary_folder_names_the_one_that_it_was_to_become(tmp_path: Path) -> None:
    final = tmp_path / "bundle"
    with (
        pytest.raises(OutputError, match=re.escape(f"{final}/weights: cannot write")),
        durable.temporary_directory_beside(final) as temporary,
    ):
        raise OutputError(f"{temporary}/weights: cannot write")
    assert list(tmp_path.iterdir()) == []
