"""Gaussian noise that depends on nothing but (seed, image index, stream, position): the same bytes everywhere.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): key = the 64-bit seed, low word
first; counter words = (block, stream, index low, index high); the value at position p in C order of an image is word
p % 4 of block p // 4. A word w becomes the normal quantile of (w + 0.5) / 2^32, within 1e-8, at most 6.34 in size.

Only exactly rounded operations (+ - * / sqrt, integers, bits; the one logarithm is `decimal`'s) are used, none of
numpy's SIMD log or cos: no machine, numpy version or batch changes a bit.
"""

import math
import operator
from collections.abc import Sequence
from decimal import Context, Decimal
from functools import cache, lru_cache

import numpy as np

from ul_runtime.errors import UsageError

_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_LOW, _HALF = np.uint64(_WORD), np.uint64(32)
_CHUNK = 4096  # blocks at a time: the work arrays stay in the second-level cache

# The quantile table: every octave of 2^32 u in [2^-1, 2^31) has 32 segments with one cubic each.
_OCTAVES, _SEGMENT_BITS = 32, 5
_SEGMENTS = 1 << _SEGMENT_BITS
_SHIFT = np.uint64(52 - _SEGMENT_BITS)
_FIRST = np.uint64(1022 << _SEGMENT_BITS)  # 1022: the exponent field of 0.5
_FRACTION = np.uint64((1 << (52 - _SEGMENT_BITS)) - 1)
_ONE = np.uint64(0x3FF0000000000000)
_MIDDLE = 1.0 + 0.5 / _SEGMENTS


# Streams: what the noise is for. Steps have 2^28 streams each, by `prior_step` and `decoder_step`.
PRIOR_START = 0
DECODER_START = 1
ENCODER = 2
_PRIOR_STEP, _DECODER_STEP, _NUM_STEPS = 0x10000000, 0x20000000, 2**28


def prior_step(step: int) -> int:
    """Stream of the noise that step `step` (from 0) of the prior's sampling adds."""
    return _step_stream(_PRIOR_STEP, step)


def decoder_step(step: int) -> int:
    """Stream of the noise that step `step` (from 0) of the decoder's sampling adds."""
    return _step_stream(_DECODER_STEP, step)


def _step_stream(first: int, step: int) -> int:
    if not 0 <= step < _NUM_STEPS:
        raise ValueError(f"step {step}: expected 0 to 2^28 - 1")
    return first + step


def philox4x32(even: np.ndarray, odd: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Philox4x32-10 of n counters, words 0 and 2 in `even`, 1 and 3 in `odd` (uint64 `2 n`, overwritten), so out."""
    high = np.empty_like(even)
    for key in _round_keys(seed):
        np.multiply(even, _MULTIPLIERS, out=even)
        np.right_shift(even, _HALF, out=high)
        np.bitwise_xor(odd, high[::-1], out=odd)
        np.bitwise_xor(odd, key, out=odd)
        np.bitwise_and(even, _LOW, out=even)
        even, odd = odd, even[::-1]
    return even, odd


@lru_cache(maxsize=16)
def _round_keys(seed: int) -> np.ndarray:
    """The keys of the ten rounds, `10 2 1`."""
    first = seed & _WORD, seed >> 32
    keys = [[(word + k * step) & _WORD for word, step in zip(first, _WEYL, strict=True)] for k in range(10)]
    return np.array(keys, np.uint64)[:, :, None]


# Wichura 1988, algorithm AS 241 (PPND16): numerators and denominators, highest power first.
_CENTRE = (
    (2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
     13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608),
    (5226.495278852545925, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867,
     5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1.0),
)  # fmt: skip
_TAIL = (
    (7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177, 1.27045825245236838258,
     3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734),
    (1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966, 0.14810397642748007459,
     0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187, 1.0),
)  # fmt: skip


def _ratio(x: np.ndarray, coefficients: tuple[tuple[float, ...], tuple[float, ...]]) -> np.ndarray:
    numerator, denominator = (np.zeros_like(x) for _ in range(2))
    for a, b in zip(*coefficients, strict=True):
        numerator, denominator = numerator * x + a, denominator * x + b
    return numerator / denominator


def _quantile(u: np.ndarray) -> np.ndarray:
    """Normal quantile of float64 u in [2^-33, 0.5), within 1e-15 relative (AS 241)."""
    centred = u - 0.5
    centre = centred * _ratio(0.180625 - centred * centred, _CENTRE)
    tail = u < 0.075
    centre[tail] = -_ratio(np.sqrt(-_logarithm(u[tail])) - 1.6, _TAIL)
    return centre


def _logarithm(u: np.ndarray) -> np.ndarray:
    """Natural logarithm of float64 u > 0, rounded to 20 digits and then to float64: the same on every machine.

    Of m 2^e as ln m + e ln 2: the table's thousands of nodes have but a few m.
    """
    wide, rounded = Context(prec=50), Context(prec=20)
    significands, exponents = (part.tolist() for part in np.frexp(u))
    log_2, logs = Decimal(2).ln(wide), {m: Decimal(m).ln(wide) for m in set(significands)}
    return np.array([float(rounded.fma(e, log_2, logs[m])) for m, e in zip(significands, exponents, strict=True)])


@cache
def quantile_table() -> tuple[np.ndarray, ...]:
    """Coefficients c_0..c_3, each `octave*segment`, of quantile(u) / (2^32 u - 2^31) at Chebyshev nodes.

    The cubic's variable is the offset from the middle of the segment in the significand of 2^32 u.
    """
    octave = np.repeat(np.array([2.0**e for e in range(-1, _OCTAVES - 1)]), _SEGMENTS)
    middle = np.tile(np.arange(_SEGMENTS) / _SEGMENTS, _OCTAVES) + _MIDDLE

    def ratio(offset: float) -> np.ndarray:
        x = octave * (middle + offset)
        return _quantile(x * 2.0**-32) / (x - 2.0**31)

    far, near = 0.92387953251128674 * 0.5 / _SEGMENTS, 0.38268343236508977 * 0.5 / _SEGMENTS
    even = [(ratio(node) + ratio(-node)) * 0.5 for node in (far, near)]
    odd = [(ratio(node) - ratio(-node)) / (2.0 * node) for node in (far, near)]
    c_2, c_3 = ((far_value - near_value) / (far * far - near * near) for far_value, near_value in (even, odd))
    return even[0] - c_2 * (far * far), odd[0] - c_3 * (far * far), c_2, c_3


def words_to_normals(words: np.ndarray) -> np.ndarray:
    """Normal quantile of (w + 0.5) / 2^32 for uint64 words w < 2^32, as float64, odd about the middle, any shape."""
    centred = words.astype(np.float64)
    centred -= 2.0**31 - 0.5
    magnitude = np.abs(centred)
    np.subtract(2.0**31, magnitude, out=magnitude)  # 2^32 u of the smaller tail, exact
    bits = magnitude.view(np.uint64)
    segment = bits >> _SHIFT
    segment -= _FIRST
    index = segment.view(np.int64)
    bits &= _FRACTION
    bits |= _ONE
    magnitude -= _MIDDLE
    coefficients = quantile_table()
    value = np.take(coefficients[3], index, mode="clip")
    term = np.empty_like(value)
    for coefficient in reversed(coefficients[:3]):
        value *= magnitude
        np.take(coefficient, index, mode="clip", out=term)
        value += term
    value *= centred
    return value


def _uint64(values: Sequence[int] | np.ndarray, what: str) -> list[int]:
    try:
        numbers = [operator.index(value) for value in values]
    except TypeError as error:
        raise UsageError(f"{what}: {error}; whole numbers are expected") from error
    for number in numbers:
        if not 0 <= number < 2**64:
            raise UsageError(f"{what}: {number} is out of range; expected 0 to 2^64 - 1")
    return numbers


def normals(seed: int, indices: Sequence[int] | np.ndarray, stream: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal noise, float32 `[len(indices), *shape]`; row i depends on (seed, indices[i], stream) alone.

    UsageError: a seed or index that is not in [0, 2^64).
    """
    (seed,), numbers = _uint64([seed], "seed"), _uint64(indices, "image index")
    size = math.prod(shape)
    blocks = -(-size // 4)
    if not 0 <= stream < 2**32 or blocks > 2**32:
        raise ValueError(f"stream {stream}, {size} values: streams are below 2^32, values at most 2^34")
    index = np.array(numbers, np.uint64)
    result = np.empty((len(numbers) * blocks, 4), np.float32)
    for start in range(0, len(result), _CHUNK):
        stop = min(start + _CHUNK, len(result))
        row, block = np.divmod(np.arange(start, stop), blocks)
        image = index[row]
        even = np.stack([block.astype(np.uint64), image & _LOW])
        odd = np.stack([np.full(stop - start, stream, np.uint64), image >> _HALF])
        even, odd = philox4x32(even, odd, seed)
        words = np.stack([even[0], odd[0], even[1], odd[1]], axis=1)
        result[start:stop] = words_to_normals(words)
    return result.reshape(len(numbers), 4 * blocks)[:, :size].reshape(len(numbers), *shape)
