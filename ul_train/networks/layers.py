"""The layers that all four networks are built of. Written so that they export: no data-dependent branch."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class LogsnrEmbedding(nn.Module):
    """logsnr `b` -> conditioning vector `b d`; sinusoidal features, always computed in float32."""

    frequencies: Tensor

    def __init__(self, dim: int, num_features: int = 64) -> None:
        super().__init__()
        low, high = math.log(0.05), math.log(8.0)  # radians per unit of logsnr: from one slow wave to fine detail
        self.register_buffer("frequencies", torch.exp(torch.linspace(low, high, num_features // 2)), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(num_features, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, logsnr: Tensor) -> Tensor:
        angles = logsnr.float()[:, None] * self.frequencies
        features = torch.cat([angles.sin(), angles.cos()], dim=1)  # b f
        return self.mlp(features)


def attention(q: Tensor, k: Tensor, v: Tensor, one_operator: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, each `b heads n d`.

    Written out in exported graphs, unless they know it as `one_operator`, and for bfloat16 on a CPU: with 64 tokens,
    forward and backward take 11 ms against 52 ms of torch's fused operator (batch 128, 4 heads of 64, two cores with
    AVX512-BF16).
    """
    if (torch.compiler.is_exporting() and not one_operator) or (q.device.type == "cpu" and q.dtype == torch.bfloat16):
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + 1e-6) gain over the last axis (Zhang & Sennrich 2019).

    Written out in exported graphs, in the one form that ONNX Runtime fuses.
    """
    if torch.compiler.is_exporting():
        return x / (x.pow(2).mean(dim=-1, keepdim=True) + 1e-6).sqrt() * gain
    return F.rms_norm(x, x.shape[-1:], gain.to(x.dtype), eps=1e-6)


class SelfAttention(nn.Module):
    """Multi-head self-attention with RMS-normalised queries and keys (Dehghani et al. 2023).

    `one_operator`: what an exported graph makes of it, see `attention`.
    """

    one_operator = False

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = dim // head_dim, head_dim
        self.qkv = nn.Linear(dim, 3 * dim)
        self.gain_q, self.gain_k = nn.Parameter(torch.ones(head_dim)), nn.Parameter(torch.ones(head_dim))
        self.out = nn.Linear(dim, dim)

    def forward(self, h: Tensor) -> Tensor:
        b, n, d = h.shape
        qkv = self.qkv(h).reshape(b, n, 3 * self.num_heads, self.head_dim).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=1)  # each b heads n head_dim
        h = attention(rms_norm(q, self.gain_q), rms_norm(k, self.gain_k), v, self.one_operator)
        return self.out(h.transpose(1, 2).reshape(b, n, d))


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP, modulated by `modulation` `b 6 d` plus the block's own bias.

    One modulation serves all blocks of a level (adaLN-single, Chen et al. 2023);
    gates start at zero (Peebles & Xie 2022).
    """

    def __init__(self, dim: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(6, dim))
        self.norm_1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attention = SelfAttention(dim, head_dim)
        self.norm_2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, modulation: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (modulation + self.bias).chunk(6, dim=1)  # each b 1 d
        h = h + gate_1 * self.dropout(self.attention(self.norm_1(h) * (1 + scale_1) + shift_1))
        return h + gate_2 * self.dropout(self.mlp(self.norm_2(h) * (1 + scale_2) + shift_2))


class Modulation(nn.Module):
    """conditioning `b c` -> `b k d`, starts at zero."""

    def __init__(self, cond_dim: int, num_parts: int, dim: int) -> None:
        super().__init__()
        self.num_parts, self.dim = num_parts, dim
        self.linear = nn.Linear(cond_dim, num_parts * dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, cond: Tensor) -> Tensor:
        return self.linear(F.silu(cond)).reshape(-1, self.num_parts, self.dim)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with group normalisation; `cond_dim` adds scale and shift from the conditioning vector."""

    def __init__(self, in_channels: int, channels: int, cond_dim: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm_1 = nn.GroupNorm(num_groups(in_channels), in_channels)
        self.conv_1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.norm_2 = nn.GroupNorm(num_groups(channels), channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, channels, 1) if in_channels != channels else nn.Identity()
        self.modulation = Modulation(cond_dim, 2, channels) if cond_dim is not None else None
        nn.init.zeros_(self.conv_2.weight)

    def forward(self, h: Tensor, cond: Tensor | None = None) -> Tensor:
        y = self.norm_2(self.conv_1(F.silu(self.norm_1(h))))
        if self.modulation is not None and cond is not None:
            m = self.modulation(cond)[:, :, :, None, None]  # b 2 c 1 1
            y = y * (1 + m[:, 1]) + m[:, 0]
        return self.skip(h) + self.conv_2(self.dropout(F.silu(y)))


def grid_positions(size: int, dim: int) -> Tensor:
    """Sines and cosines of row and column, `(size size) dim`: where the learned positions of a token grid start.

    At unit scale: positions that start near zero cost a small model hundreds of steps before its samples hold together
    (fashion-32, base loss after 200 steps of 128: 71 nats from these, 92 from a normal of standard deviation 0.02).
    """
    angles = torch.arange(size)[:, None] * torch.exp(-math.log(100.0) * torch.arange(dim // 4) / (dim // 4))
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # size dim/2
    rows = waves[:, None].expand(size, size, -1)
    return torch.cat([rows, rows.transpose(0, 1)], dim=2).reshape(size**2, dim)


def num_groups(channels: int) -> int:
    """Groups of about 16 channels; the largest number of groups up to channels / 16 that divides them."""
    groups = max(1, channels // 16)
    while channels % groups:
        groups -= 1
    return groups


def to_tokens(h: Tensor) -> Tensor:
    """b d h w -> b (h w) d."""
    return h.flatten(2).transpose(1, 2)


def to_grid(h: Tensor, size: int) -> Tensor:
    """b (h w) d -> b d h w, h = w = size."""
    b, _, d = h.shape
    return h.transpose(1, 2).reshape(b, d, size, size)


def merge_tokens(h: Tensor, size: int) -> Tensor:
    """b (h w) d -> b (h/2 w/2) (d 2 2), h = w = size: 2 x 2 tokens become one, as in pixel_unshuffle."""
    b, n, d = h.shape
    return h.reshape(b, size // 2, 2, size // 2, 2, d).permute(0, 1, 3, 5, 2, 4).reshape(b, n // 4, 4 * d)


def split_tokens(h: Tensor, size: int) -> Tensor:
    """b (h w) (d 2 2) -> b (2h 2w) d, h = w = size: the inverse of merge_tokens, as in pixel_shuffle."""
    b, n, d = h.shape
    return h.reshape(b, size, size, d // 4, 2, 2).permute(0, 1, 4, 2, 5, 3).reshape(b, 4 * n, d // 4)
