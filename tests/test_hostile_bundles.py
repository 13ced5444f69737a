"""A bundle whose hashes are right is still not believed: hostile content is refused within seconds, in one line."""

import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
from hostile_bundles import CASES, Parts

import ul_runtime
from ul_runtime.errors import ULError

_SECONDS = 30  # a hang is minutes, or for ever


@pytest.fixture
def no_hang() -> Iterator[None]:
    def hangs(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def outcome(bundle: Path) -> tuple[int, str]:
    """Exit code and message of a command that makes an image of it."""
    try:
        pipeline = ul_runtime.load(bundle, backend="ort-cpu", threads=1)
        for batch in pipeline.generate(1, steps=1, decoder_steps=1):
            assert batch.images.shape == (1, 8, 8, 3)
    except ULError as error:
        return error.exit_code, str(error)
    return 0, ""


@pytest.mark.case(
    "A3",
    "80 bundles with right hashes and hostile content: loops, functions, other files, lies of the manifest",
    "each is refused with 65 or 77 before an engine sees the graph, or is harmless; NaN ends with 76",
)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("no_hang")
def test_a_hostile_bundle_is_refused_in_one_line(analytic_bundle: Path, tmp_path: Path, case: str) -> None:
    parts, (expected, change) = Parts.of(analytic_bundle), CASES[case]
    change(parts)
    parts.write(tmp_path / "bundle")
    code, message = outcome(tmp_path / "bundle")
    assert (code, case) == (expected, case), message
    assert len(message) < 1000
    assert all(letter.isprintable() for letter in message), ascii(message)


@pytest.mark.case("A3")
def test_the_parts_of_a_good_bundle_written_again_make_its_image(analytic_bundle: Path, tmp_path: Path) -> None:
    """The control of the cases above."""
    Parts.of(analytic_bundle).write(tmp_path / "bundle")
    assert outcome(tmp_path / "bundle") == (0, "")
