"""Arguments from Python that cannot be: each is a UsageError, before anything is computed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ul_runtime
from ul_runtime.errors import UsageError
from ul_runtime.pipeline import Pipeline


@pytest.fixture(scope="module")
def pipeline(analytic_bundle: Path) -> Pipeline:
    return ul_runtime.load(analytic_bundle, threads=1)


NAN = float("nan")
REFUSED: list[dict[str, Any]] = [
    *({"images": each} for each in (0, -1, 2**63, 10**13, [2**63], [-1], ["a"], [1.5], None, 1.0, "3", [[1]])),
    {"images": np.zeros((2, 2), np.int64)},
    *({"seed": each} for each in (-1, 2**64, "a", 1.5, None, True)),
    *({"labels": each} for each in ("nope", 99, [], [None], [["red"]], 1.5, {1: "red"}, True, b"red")),
    *({"steps": each} for each in (0, 10**9, "3", 2.5, True)),
    *({"sampler": each} for each in ("x" * 10_000, 5, b"ddim", ["ddim"])),
    *({"grid": each} for each in ("mix:9", 5, ("uniform",))),
    *({"guidance": each} for each in (NAN, "a", "2", [2.0], True)),
    *({"guidance_interval": each} for each in ((3, 1), 5, ("a", "b"), (NAN, 1), "all", (1,), (0, 1, 2))),
    *({"guidance_rescale": each} for each in (2, -1, NAN, "0.5")),
    *({"batch_size": each} for each in (0, -5, 1.5, "8")),
    {"nosuch": 1},
]


@pytest.mark.case("A16", "43 kinds of bad arguments from Python", "each is a UsageError that says what was expected")
@pytest.mark.parametrize("arguments", REFUSED, ids=lambda each: repr(each)[:40])
def test_a_bad_argument_is_a_usage_error(pipeline: Pipeline, arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        pipeline.generate(**{"images": 1, **arguments})


@pytest.mark.case("A12", "generate(10**13) and generate(2**63)", "refused: at most 100,000,000 images in one call")
@pytest.mark.parametrize("count", [10**8 + 1, 10**13, 2**63, 2**64])
def test_more_images_than_indices_can_be_held_are_refused(pipeline: Pipeline, count: int) -> None:
    with pytest.raises(UsageError, match=f"the number of images is {count}; expected at most 100000000"):
        pipeline.generate(count)


@pytest.mark.case("A16")
@pytest.mark.parametrize("array", [[[1.0]], "x", None, np.array([["a"]]), np.zeros((1, 3, 7, 8), np.float32)])
@pytest.mark.parametrize("method", ["encode", "bits", "decode"])
def test_what_is_no_array_of_that_shape_is_a_usage_error(pipeline: Pipeline, method: str, array: Any) -> None:
    with pytest.raises(UsageError):
        getattr(pipeline, method)(array)


def test_numbers_of_numpy_are_numbers(pipeline: Pipeline) -> None:
    """The control: not everything is refused."""
    settings: Any = {
        "steps": np.int64(2),
        "guidance": np.float32(2.0),
        "guidance_interval": np.array([0.0, 1]),
    }
    (batch,) = pipeline.generate(np.array([0, 5]), seed=np.uint64(3), batch_size=np.int8(2), **settings)
    assert len(batch.images) == 2
