"""Noise: Philox against its published vectors, the transform against the exact quantile, golden bytes, independence.

`python tests/test_noise.py` writes golden_noise.json anew; it must never have to.
"""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from ul_runtime import noise
from ul_runtime.errors import UsageError

GOLDEN = Path(__file__).with_name("golden_noise.json")
EDGES = [0, 1, 2**32 - 1, 2**32, 2**64 - 1]
SHAPE = (2, 3, 3)
NUM_DRAWS = 2**20


def golden_cases() -> list[dict[str, int]]:
    seeds = [{"seed": seed, "index": 7, "stream": noise.PRIOR_START} for seed in EDGES]
    indices = [{"seed": 7, "index": index, "stream": noise.decoder_step(3)} for index in EDGES]
    return seeds + indices


def hex_of(case: dict[str, Any]) -> str:
    values = noise.normals(case["seed"], [case["index"]], case["stream"], SHAPE)
    return values.astype("<f4").tobytes().hex()


def philox(counter: list[int], seed: int) -> list[int]:
    words = np.array(counter, np.uint64)[:, None]
    even, odd = noise.philox4x32(words[0::2].copy(), words[1::2].copy(), seed)
    return [int(word) for word in (even[0, 0], odd[0, 0], even[1, 0], odd[1, 0])]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_vectors_of_random123(counter: str, key: str, expected: str) -> None:
    low, high = (int(word, 16) for word in key.split())
    words = philox([int(word, 16) for word in counter.split()], low | high << 32)
    assert words == [int(word, 16) for word in expected.split()]


def test_the_counter_is_block_stream_index_and_the_key_is_the_seed() -> None:
    seed, index, stream = 2**40 + 5, 2**33 + 9, noise.decoder_step(2)
    words = [word for block in range(3) for word in philox([block, stream, index % 2**32, index >> 32], seed)]
    expected = [NormalDist().inv_cdf((word + 0.5) / 2**32) for word in words]
    np.testing.assert_allclose(noise.normals(seed, [index], stream, (12,))[0], expected, rtol=1e-7)


# --- golden bytes


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text()) if GOLDEN.exists() else [])
@pytest.mark.case("G11", "seeds and indices up to 2^64 - 1", "the noise of the first release, byte for byte")
def test_the_bytes_are_those_of_the_first_release(case: dict[str, Any]) -> None:
    assert hex_of(case) == case["float32"]


def test_the_golden_file_has_the_edges_of_seed_and_index() -> None:
    kept = json.loads(GOLDEN.read_text())
    assert [{key: case[key] for key in ("seed", "index", "stream")} for case in kept] == golden_cases()
    assert len({case["float32"] for case in kept}) == len(kept)


def test_the_bytes_do_not_depend_on_the_vector_units_of_the_cpu() -> None:
    units: Any = importlib.import_module("numpy._core._multiarray_umath")
    present = [name for name in units.__cpu_dispatch__ if units.__cpu_features__.get(name)]
    code = "from test_noise import *; print(''.join(hex_of(case) for case in golden_cases()))"
    environment = os.environ | {"NPY_DISABLE_CPU_FEATURES": " ".join(present)}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(noise.__file__).parents[1]), str(GOLDEN.parent)])
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "".join(hex_of(case) for case in golden_cases())


# --- the transform


def relative_error(words: np.ndarray, values: np.ndarray) -> float:
    """Largest |q / quantile - 1|, from the distribution function: erf in the middle, erfc in the tails."""
    worst = 0.0
    for word, q in zip(words.tolist(), values.tolist(), strict=True):
        size, tail = abs(q), (min(word, 2**32 - 1 - word) + 0.5) / 2**32
        if size < 0.5:
            off = 0.5 * math.erf(size / math.sqrt(2.0)) - (0.5 - tail)
        else:
            off = tail - 0.5 * math.erfc(size / math.sqrt(2.0))
        worst = max(worst, abs(off) / (math.exp(-0.5 * q * q) / math.sqrt(2.0 * math.pi)) / size)
    return worst


def hard_words() -> np.ndarray:
    """Both ends, the middle, both sides of every segment border, and some in between."""
    borders = [int(2.0**e * (1 + j / 32)) for e in range(31) for j in range(32)]
    near = {border + d for border in borders for d in (-1, 0, 1)} | set(range(1000))
    lower = np.array(sorted(word for word in near if 0 <= word < 2**31), np.uint64)
    middle = np.arange(2**31 - 500, 2**31 + 500, dtype=np.uint64)
    return np.unique(
        np.concatenate([lower, middle, (2**32 - 1) - lower, np.arange(0, 2**32, 2**19 + 7).astype(np.uint64)])
    )


def test_the_transform_is_the_normal_quantile_within_1e_8_everywhere() -> None:
    words = hard_words()
    assert relative_error(words, noise.words_to_normals(words)) < 1e-8


def test_the_quantile_check_finds_an_error_of_1e_7_in_one_word() -> None:
    words = hard_words()
    values = noise.words_to_normals(words)
    values[123] *= 1.0 + 1e-7
    assert relative_error(words, values) > 5e-8


def test_the_transform_rises_is_odd_and_reaches_both_tails() -> None:
    words = hard_words()
    values = noise.words_to_normals(words)
    assert np.all(np.diff(values) > 0)
    np.testing.assert_array_equal(noise.words_to_normals((2**32 - 1) - words), -values)
    assert values[0] == pytest.approx(-6.337957754)


# --- statistics


def not_normal(x: np.ndarray) -> list[str]:
    """Which tests of normality `x` fails: mean, variance, skewness, kurtosis (5 sigma), Kolmogorov-Smirnov (0.1 %)."""
    n, x = x.size, x.astype(np.float64).ravel()
    moments = {"mean": (1, 0.0, 1.0), "variance": (2, 1.0, 2.0), "skewness": (3, 0.0, 15.0), "kurtosis": (4, 3.0, 96.0)}
    failed = [
        name for name, (k, want, spread) in moments.items() if abs(np.mean(x**k) - want) > 5 * math.sqrt(spread / n)
    ]
    levels = np.arange(1, 2000) / 2000
    counts = np.searchsorted(np.sort(x), [NormalDist().inv_cdf(level) for level in levels])
    return failed + (["ks"] if np.max(np.abs(counts / n - levels)) > 1.95 / math.sqrt(n) else [])


def draw(seed: int = 1, index: int = 0, stream: int = 0) -> np.ndarray:
    return noise.normals(seed, [index], stream, (NUM_DRAWS,))[0]


def test_a_million_draws_are_normal_along_one_image_and_across_images() -> None:
    assert not_normal(draw()) == []
    assert not_normal(noise.normals(3, range(NUM_DRAWS // 16), noise.ENCODER, (4, 2, 2))) == []


def test_the_normality_check_finds_wrong_transforms() -> None:
    x = draw()
    assert "ks" in not_normal(x * 1.01)
    assert "mean" in not_normal(x + 0.01)
    assert "kurtosis" in not_normal(np.clip(x, -3, 3))
    uniforms = (np.vectorize(math.erf)(x[: 2**17] / math.sqrt(2)) + 1) / 2
    logistic = np.log(uniforms / (1 - uniforms)) * math.sqrt(3) / math.pi
    assert {"kurtosis", "ks"} <= set(not_normal(logistic))


def related(x: np.ndarray, y: np.ndarray) -> bool:
    """Correlation of the values or of their squares beyond 5 sigma."""
    pairs = [(x, y), (x * x - 1, y * y - 1)]
    return any(abs(np.corrcoef(a, b)[0, 1]) > 5 / math.sqrt(x.size) for a, b in pairs)


@pytest.mark.parametrize("index", [0, 2**32 - 1])
def test_neighbouring_images_seeds_streams_and_positions_are_unrelated(index: int) -> None:
    x = draw(index=index)
    assert not related(x, draw(index=index + 1))
    assert not related(x, draw(index=index, seed=2))
    assert not related(x, draw(index=index, stream=noise.DECODER_START))
    assert not related(draw(stream=noise.prior_step(0)), draw(stream=noise.decoder_step(0)))
    assert not related(x[1:], x[:-1])


def test_the_relation_check_finds_related_noise() -> None:
    x, y = draw(), draw(index=1)
    assert related(x, x + 100 * y)
    assert related(x, np.abs(x) * np.sign(y))


def test_indices_and_seeds_do_not_collide_at_32_bits() -> None:
    rows = noise.normals(0, [0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**64 - 1], 0, (4,))
    seeds = [noise.normals(seed, [0], 0, (4,))[0] for seed in (1, 2**32, 2**32 + 1, 2**64 - 1)]
    streams = [0, 1, 2, noise.prior_step(0), noise.prior_step(1), noise.decoder_step(0), noise.decoder_step(1)]
    others = [noise.normals(0, [0], stream, (4,))[0] for stream in streams[1:]]
    assert len({row.tobytes() for row in [*rows, *seeds, *others]}) == 6 + 4 + 6


# --- what a value depends on


def test_a_row_does_not_depend_on_its_batch() -> None:
    shape, indices = (3, 17, 5), [5, 2**40, 0, 5, 9999, *range(100, 400)]
    together = noise.normals(11, indices, 4, shape)
    assert together.dtype == np.float32
    assert together.shape == (len(indices), *shape)
    for i in (0, 1, 2, 3, 4, 150, 304):
        np.testing.assert_array_equal(together[i], noise.normals(11, [indices[i]], 4, shape)[0])
    np.testing.assert_array_equal(noise.normals(11, indices[::-1], 4, shape), together[::-1])


def test_a_value_depends_on_its_position_and_not_on_the_size_of_the_image() -> None:
    long = noise.normals(11, [3], 4, (50_001,))[0]
    for size in (1, 2, 3, 4, 5, 4096, 20_000):
        np.testing.assert_array_equal(noise.normals(11, [3], 4, (size,))[0], long[:size])


def test_no_images_and_no_values_are_fine() -> None:
    assert noise.normals(1, [], 0, (3, 2)).shape == (0, 3, 2)
    assert noise.normals(1, [1, 2], 0, (3, 0)).shape == (2, 3, 0)


@pytest.mark.parametrize("bad", [-1, 2**64, 1.5, "7", None])
def test_a_seed_or_index_that_is_not_a_64_bit_number_is_refused(bad: Any) -> None:
    with pytest.raises(UsageError, match="seed"):
        noise.normals(bad, [0], 0, (4,))
    with pytest.raises(UsageError, match="image index"):
        noise.normals(0, [0, bad], 0, (4,))


def test_streams_stay_in_their_ranges() -> None:
    assert noise.prior_step(2**28 - 1) < noise.decoder_step(0)
    assert noise.decoder_step(2**28 - 1) < 2**32
    for step in (noise.prior_step, noise.decoder_step):
        for bad in (-1, 2**28):
            with pytest.raises(ValueError, match="step"):
                step(bad)
    with pytest.raises(ValueError, match="stream"):
        noise.normals(0, [0], 2**32, (4,))


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps([case | {"float32": hex_of(case)} for case in golden_cases()], indent=1) + "\n")
