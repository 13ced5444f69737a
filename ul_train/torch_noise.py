"""Noise by torch on its device, byte for byte that of ul_runtime.noise, which says what is computed and why.

int64 holds the words, and wraps where uint64 would; all else is exactly rounded as there.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ul_runtime.noise import quantile_table

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
_CHUNK = 2**22  # blocks of four values at a time: the work takes 300 MB at most


def normals(seed: int, indices: Tensor, stream: int, size: int) -> Tensor:
    """Standard normal noise, float32 `[len(indices), size]`, on the device of `indices` (int64)."""
    blocks = -(-size // 4)
    result = torch.empty(len(indices) * blocks, 4, dtype=torch.float32, device=indices.device)
    for start in range(0, len(result), _CHUNK):
        at = torch.arange(start, min(start + _CHUNK, len(result)), device=indices.device)
        row = at // blocks
        result[start : start + len(at)] = _quantiles(_philox(at - row * blocks, stream, indices[row], seed))
    return result.view(len(indices), 4 * blocks)[:, :size]


def _philox(block: Tensor, stream: int, index: Tensor, seed: int) -> Tensor:
    """Philox4x32-10 of n counters: words `n 4`, int64."""
    even = [block & _WORD, index & _WORD]
    odd = [torch.full_like(block, stream), (index >> 32) & _WORD]
    key = [seed & _WORD, seed >> 32]
    for _ in range(10):
        products = [word * multiplier for word, multiplier in zip(even, _MULTIPLIERS, strict=True)]
        high = [(product >> 32) & _WORD for product in products]
        even = [high[1] ^ odd[0] ^ key[0], high[0] ^ odd[1] ^ key[1]]
        odd = [products[1] & _WORD, products[0] & _WORD]
        key = [(word + step) & _WORD for word, step in zip(key, _WEYL, strict=True)]
    return torch.stack([even[0], odd[0], even[1], odd[1]], dim=1)


def _quantiles(words: Tensor) -> Tensor:
    """See noise.words_to_normals; float64."""
    centred = words.double() - (2.0**31 - 0.5)
    bits = (2.0**31 - centred.abs()).view(torch.int64)
    segment = (bits >> 47) - (1022 << 5)
    offset = ((bits & (2**47 - 1)) | 0x3FF0000000000000).view(torch.float64) - (1.0 + 0.5 / 32)
    table = _table(words.device)
    value = table[3][segment]
    for coefficient in (2, 1, 0):
        value = value.mul_(offset).add_(table[coefficient][segment])
    return value.mul_(centred)


@lru_cache(maxsize=16)
def _table(device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack(quantile_table())).to(device)
