"""The comparator that the check of a bundle rests on: what it must refuse, and whether these tests would notice."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from ul_export import verify

TOLERANCE = verify.Tolerance(absolute=1e-5, relative=1e-4)
RIGHT = np.random.default_rng(0).standard_normal((3, 4, 5, 5)).astype(np.float32)


def changed(value: float, at: tuple[int, ...] = (1, 2, 3, 4)) -> np.ndarray:
    array = RIGHT.copy()
    array[at] = value
    return array


def off_by(share: float) -> np.ndarray:
    """One value lower (share below 0: higher) by `share` of its tolerance."""
    at = (2, 3, 0, 1)
    bound = TOLERANCE.absolute + TOLERANCE.relative * abs(float(RIGHT[at]))
    return changed(float(RIGHT[at]) - share * bound, at)


# name -> expected output, actual output, what the reason has to say
FAULTY = {
    "NaN on both sides": (changed(np.nan), changed(np.nan), "1 expected values are not finite"),
    "NaN in the actual output": (RIGHT, changed(np.nan), "1 actual values are not finite"),
    "NaN in the expected output": (changed(np.nan), RIGHT, "1 expected values are not finite"),
    "all NaN on both sides": (RIGHT * np.nan, RIGHT * np.nan, "300 expected values are not finite"),
    "Inf on both sides": (changed(np.inf), changed(np.inf), "1 expected values are not finite"),
    "Inf in the actual output": (RIGHT, changed(-np.inf), "1 actual values are not finite"),
    "Inf in the expected output": (changed(np.inf), RIGHT, "1 expected values are not finite"),
    "no actual output": (RIGHT, None, "missing on one side"),
    "an output too many": (None, RIGHT, "missing on one side"),
    "another shape": (RIGHT, RIGHT[:2], "shape [2, 4, 5, 5], expected [3, 4, 5, 5]"),
    "a shape that broadcasts": (RIGHT * 0, RIGHT[:1] * 0, "shape [1, 4, 5, 5], expected [3, 4, 5, 5]"),
    "another dtype": (RIGHT, RIGHT.astype(np.float64), "dtype float64, expected float32"),
    "nothing in it": (RIGHT[:0], RIGHT[:0], "empty"),
    "too low, just over tolerance": (RIGHT, off_by(1.01), "[2, 3, 0, 1] is"),
    "too high, just over tolerance": (RIGHT, off_by(-1.01), "[2, 3, 0, 1] is"),
    "rows of the batch swapped": (RIGHT, RIGHT[[1, 0, 2]], "] is"),
    "the sign turned": (RIGHT, -RIGHT, "] is"),
}


def wrongly_accepted(module: ModuleType) -> list[str]:
    """Which faulty outputs `module.compare` and `module.compare_outputs` let pass, or refuse for another reason."""
    accepted = []
    for name, (expected, actual, reason) in FAULTY.items():
        sides = [{} if array is None else {"pred": array} for array in (expected, actual)]
        other = {"z_next": RIGHT}
        for found in (
            module.compare(expected, actual, TOLERANCE),
            module.compare_outputs(other | sides[0], other | sides[1], TOLERANCE).get("pred"),
        ):
            if found is None or found.within or reason not in found.reason or not found.largest > 0:
                accepted.append(name)
    if all(found.within for found in module.compare_outputs({}, {}, TOLERANCE).values()):
        accepted.append("no outputs at all")
    return accepted


@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_output_is_refused_with_its_reason(name):
    expected, actual, reason = FAULTY[name]
    difference = verify.compare(expected, actual, TOLERANCE)
    assert not difference.within
    assert reason in difference.reason
    assert difference.largest > 0


def test_every_faulty_output_is_refused_among_right_ones():
    assert wrongly_accepted(verify) == []


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, -0.99])
def test_a_difference_within_tolerance_is_accepted_and_measured(share):
    difference = verify.compare(RIGHT, off_by(share), TOLERANCE)
    assert difference.within
    assert difference.largest == pytest.approx(float(np.abs(RIGHT - off_by(share)).max()))


def test_psnr_of_images_is_that_of_their_mean_squared_error():
    assert verify.image_psnr_db(RIGHT, RIGHT) == np.inf
    assert verify.image_psnr_db(RIGHT, RIGHT + np.float32(0.02)) == pytest.approx(40.0, abs=1e-3)


@pytest.mark.parametrize(
    ("expected", "actual"), [(RIGHT, changed(np.nan)), (changed(np.nan),) * 2, (RIGHT, RIGHT[:1]), (RIGHT[:0],) * 2]
)
def test_images_without_a_psnr_are_an_error(expected, actual):
    with pytest.raises(ValueError, match="images"):
        verify.image_psnr_db(expected, actual)


WEAKER = {
    "only one value has to be finite": ("not np.isfinite(array).all()", "not np.isfinite(array).any()"),
    "only the actual side has to be finite": ('(("expected", expected), ("actual", actual))', '(("actual", actual),)'),
    "only the expected side has to be finite": (
        '(("expected", expected), ("actual", actual))',
        '(("expected", expected),)',
    ),
    "NaN becomes 0": (
        "    gap = np.abs(expected.astype(np.float64)",
        "    expected, actual = np.nan_to_num(expected), np.nan_to_num(actual)\n"
        "    gap = np.abs(expected.astype(np.float64)",
    ),
    "missing counts as equal": ('Difference(np.inf, False, "missing', 'Difference(0.0, True, "missing'),
    "missing outputs are skipped": ("{*expected, *actual}", "{*expected} & {*actual}"),
    "further outputs are skipped": ("{*expected, *actual}", "{*expected}"),
    "outputs of the wrong side": ("expected.get(name), actual.get(name)", "expected.get(name), expected.get(name)"),
    "shapes may broadcast": (
        "expected.shape != actual.shape:\n        return Difference",
        "actual.shape[1:] != expected.shape[1:] or len(actual) not in (1, len(expected)):\n        return Difference",
    ),
    "any dtype": ("expected.dtype != actual.dtype", "expected.dtype.kind != actual.dtype.kind"),
    "empty counts as equal": ('Difference(np.inf, False, "empty")', 'Difference(0.0, True, "empty")'),
    "the sign of a difference counts": ("gap = np.abs(", "gap = ("),
    "one value within tolerance is enough": ("(gap <= bound).all()", "(gap <= bound).any()"),
    "the mean has to be within tolerance": ("(gap <= bound).all()", "gap.mean() <= bound.mean()"),
    "ten per cent too tolerant": ("bound = tolerance", "bound = 1.1 * tolerance"),
    "no outputs count as equal": ("    if not names:", "    if False:"),
    "order does not count": (
        "gap = np.abs(expected.astype(np.float64)",
        "expected, actual = np.sort(expected, None), np.sort(actual, None)\n"
        "    gap = np.abs(expected.astype(np.float64)",
    ),
}
# np.nan_to_num after the finite check changes nothing: it is here with the check taken away.
ALSO = {"NaN becomes 0": ("not np.isfinite(array).all()", "False")}


def weakened(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A copy of compare.py with one thing (or, in ALSO, two) made weaker."""
    source = Path(verify.__file__).read_text()
    for old, new in (WEAKER[name], *([ALSO[name]] if name in ALSO else [])):
        assert source.count(old) == 1, f"compare.py has {old!r} {source.count(old)} times"
        source = source.replace(old, new)
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("weakened_compare", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "weakened_compare", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", WEAKER)
@pytest.mark.case("B8")
def test_a_weaker_comparator_is_noticed(name, tmp_path, monkeypatch):
    module = weakened(name, tmp_path / "compare.py", monkeypatch)
    with np.errstate(invalid="ignore"):
        assert wrongly_accepted(module)
