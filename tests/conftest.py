"""Fixtures of several test files."""

from pathlib import Path

import pytest
from command import Runner


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
