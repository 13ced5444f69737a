"""Fixtures of several test files."""

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # or the load of the machine says how many: other last digits
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # of a shell's background jobs: a Ctrl-C is to end the tests
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis
import pytest
from command import Runner

hypothesis.settings.register_profile("any machine", deadline=None)  # a busy one is slow, not wrong
hypothesis.settings.load_profile("any machine")


@pytest.fixture(scope="session", autouse=True)
def own_compile_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What torch compiles for these tests, and what a stop leaves half done there, is no other program's."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        os.environ[name] = str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="session", autouse=True)
def exported_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Torch exports each graph once for all processes of a run of the tests; see export_memo.py."""
    if "torch" not in sys.modules:  # no test that was collected needs it
        yield
        return
    import export_memo

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exported_graphs"
    folder.mkdir(exist_ok=True)
    with export_memo.kept_in(folder):
        yield


@pytest.fixture(scope="session")
def analytic_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the default bundle of analytic_bundle.py; read only."""
    from analytic_bundle import write_analytic_bundle

    path = tmp_path_factory.mktemp("bundles") / "analytic"
    write_analytic_bundle(path)
    return path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Runs a console script's main() and returns exit code, stdout and stderr."""
    return Runner(capsys, monkeypatch)


@pytest.fixture(scope="session")
def image_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of blobs.npz and of its prepared images; the cache may be written."""
    from tiny_run import write_npz

    path = tmp_path_factory.mktemp("image_store")
    write_npz(path / "blobs.npz")
    return path


@pytest.fixture
def train_options(image_store: Path, tmp_path: Path) -> list[Any]:
    """ul-train's options for a new run at tmp_path/run."""
    return ["--data", image_store / "blobs.npz", "--cache", image_store / "cache", "--out", tmp_path / "run"]


@pytest.fixture
def one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a command in this process: one thread, and a cache that no test may use."""
    import torch

    monkeypatch.setenv("UL_CACHE", str(tmp_path / "never"))
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def finished_once(image_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of ul-train; read only."""
    from tiny_run import SHORT

    from ul_train.cli import main

    run = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        arguments = [
            "tiny",
            "--data",
            image_store / "blobs.npz",
            "--cache",
            image_store / "cache",
            "--out",
            run,
            *SHORT,
        ]
        patch.setattr("sys.argv", ["ul-train", *map(str, arguments)])
        with pytest.raises(SystemExit, match="0"):
            main()
    return run


@pytest.fixture
def finished(finished_once: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, at tmp_path/run."""
    return Path(shutil.copytree(finished_once, tmp_path / "run"))
