"""Run a console script's main() in this process."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Result:
    """Exit code and what was printed."""

    code: int
    out: str
    err: str


class Runner:
    """`run(main, arguments)`; one for each test (fixture `command`)."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capsys, self.monkeypatch = capsys, monkeypatch

    def __call__(self, main: Callable[[], None], *arguments: Any) -> Result:
        self.capsys.readouterr()
        self.monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        code: str | int | None = 0
        try:
            main()
        except SystemExit as error:
            code = error.code
        out, err = self.capsys.readouterr()
        return Result(code if isinstance(code, int) else int(code is not None), out, err)

    def fails(self, main: Callable[[], None], code: int, message: str, *arguments: Any) -> None:
        """Asserts the exit code, and one line on stderr that has `message`, beside progress on a slow machine."""
        result = self(main, *arguments)
        assert result.code == code, result
        lines = [
            line
            for line in result.err.splitlines()
            if not line.endswith(" s left") and not line.startswith("backend auto: ")
        ]
        assert len(lines) == 1, result.err
        assert message in lines[0]
        assert result.out == ""
