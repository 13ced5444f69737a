"""The layers that all four networks are built of. Written so that they export: no data-dependent branch."""

import math
from collections.abc import Sequence

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


LOG_VARIANCE = -5.0  # of a learned variance at the start: about that of the fixed noise


class Encoder(nn.Module):
    """ResNet: patching, then one stage of residual blocks a resolution; downsampling patch * 2^(stages - 1).

    `learned_variance` (ablation D of the paper) adds a variance to each value, see `moments`.
    """

    def __init__(
        self,
        image_channels: int,
        latent_channels: int,
        patch: int,
        channels: Sequence[int],
        num_blocks: Sequence[int],
        learned_variance: bool = False,
    ) -> None:
        super().__init__()
        self.patch, self.learned_variance = patch, learned_variance
        self.embed = nn.Conv2d(image_channels * patch**2, channels[0], 3, padding=1)
        layers: list[nn.Module] = []
        width = channels[0]
        for stage, (stage_width, blocks) in enumerate(zip(channels, num_blocks, strict=True)):
            if stage > 0:
                layers.append(nn.Conv2d(width, stage_width, 3, stride=2, padding=1))
            layers.extend(ResidualBlock(stage_width, stage_width) for _ in range(blocks))
            width = stage_width
        self.stages = nn.Sequential(*layers)
        # The norm and this initialisation give latents near unit scale at the start. Without them the latent dies:
        # the prior's cost acts from step 1, while the decoder's use of z_0 has still to be learned.
        self.norm = nn.GroupNorm(num_groups(width), width)
        self.out = nn.Conv2d(width, latent_channels, 1)
        nn.init.normal_(self.out.weight, std=width**-0.5)

        if learned_variance:
            self.spread = nn.Conv2d(width, latent_channels, 1)
            nn.init.zeros_(self.spread.weight)
            nn.init.constant_(self.spread.bias, LOG_VARIANCE)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self._features(x))  # b cz h w

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, log of the variance) of z_clean, `b cz h w` each."""
        h = self._features(x)
        return self.out(h), self.spread(h)

    def _features(self, x: Tensor) -> Tensor:
        h = self.embed(F.pixel_unshuffle(x, self.patch))
        return self.norm(self.stages(h))


class Level(nn.Module):
    """Transformer blocks over a `size` x `size` grid of tokens, one modulation for all of them."""

    def __init__(self, dim: int, num_blocks: int, head_dim: int, cond_dim: int, dropout: float) -> None:
        super().__init__()
        self.modulation = Modulation(cond_dim, 6, dim)
        self.blocks = nn.ModuleList(TransformerBlock(dim, head_dim, dropout) for _ in range(num_blocks))

    def forward(self, h: Tensor, cond: Tensor) -> Tensor:
        modulation = self.modulation(cond)
        for block in self.blocks:
            h = block(h, modulation)
        return h


class LatentViT(nn.Module):
    """z_t, logsnr, label -> v_pred (paper: `prior` one level of 8 x 1024; `base` levels [512, 1024], blocks [6, 16]).

    Level i works on the latent grid divided by 2^i; the blocks of every level but the last are split evenly before and
    after the levels below it. `num_classes` = 0: no labels (the argument is then ignored).
    v_pred = network + carry(logsnr) z_t, a learned factor per channel: alone it is the exact denoiser of latents that
    are independent Gaussians of any scale. It and the last layer start at zero: z_pred = alpha z_t, for unit Gaussians.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        widths: Sequence[int],
        num_blocks: Sequence[int],
        head_dim: int,
        num_classes: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.size, cond_dim = size, widths[-1]
        self.logsnr_embedding = LogsnrEmbedding(cond_dim)
        self.label_embedding = nn.Embedding(num_classes + 1, cond_dim) if num_classes else None
        self.embed = nn.Linear(channels, widths[0])
        self.position = nn.Parameter(grid_positions(size, widths[0]))
        self.down, self.merge, self.up, self.split = (nn.ModuleList() for _ in range(4))
        for i, (width, blocks) in enumerate(zip(widths[:-1], num_blocks[:-1], strict=True)):
            self.down.append(Level(width, (blocks + 1) // 2, head_dim, cond_dim, dropout))
            self.merge.append(nn.Linear(4 * width, widths[i + 1]))
            self.split.append(nn.Linear(widths[i + 1], 4 * width))
            self.up.append(Level(width, blocks // 2, head_dim, cond_dim, dropout))
        self.middle = Level(widths[-1], num_blocks[-1], head_dim, cond_dim, dropout)
        self.norm = nn.LayerNorm(widths[0], elementwise_affine=False, eps=1e-6)
        self.modulation = Modulation(cond_dim, 2, widths[0])
        self.carry = Modulation(cond_dim, 1, channels)
        self.out = nn.Linear(widths[0], channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, z_t: Tensor, logsnr: Tensor, label: Tensor | None = None) -> Tensor:
        cond = self.logsnr_embedding(logsnr)  # b cond
        if self.label_embedding is not None and label is not None:
            cond = cond + self.label_embedding(label)
        h = self.embed(to_tokens(z_t)) + self.position  # b (h w) d
        skips = []
        for i, (down, merge) in enumerate(zip(self.down, self.merge, strict=True)):
            h = down(h, cond)
            skips.append(h)
            h = merge(merge_tokens(h, self.size >> i))
        h = self.middle(h, cond)
        for i in reversed(range(len(self.up))):
            h = split_tokens(self.split[i](h), self.size >> (i + 1))
            h = self.up[i](skips[i] + h, cond)
        m = self.modulation(cond)[:, :, None]  # b 2 1 d
        h = self.out(self.norm(h) * (1 + m[:, 1]) + m[:, 0])
        return to_grid(h, self.size) + self.carry(cond)[:, 0, :, None, None] * z_t  # b cz h w


class ConvStage(nn.Module):
    """Residual blocks at one resolution, `in_channels` -> `channels`."""

    def __init__(self, in_channels: int, channels: int, num_blocks: int, cond_dim: int) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * (num_blocks - 1)
        self.blocks = nn.ModuleList(ResidualBlock(width, channels, cond_dim) for width in widths)

    def forward(self, h: Tensor, cond: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h, cond)
        return h


class DecoderUViT(nn.Module):
    """x_t, logsnr, z_0 -> v_pred. Convolutional stages at resolutions size / patch / 2^i, transformer below them.

    The transformer's grid is size / (patch * 2^stages), the latent's resolution: z_0 enters there, unscaled.
    v_pred = network + carry(logsnr) x_t, a learned factor per channel (as c_skip of Karras et al. 2022): v holds the
    noise of every pixel, which the network would have to pass through its norms. Last layer and carry start at zero:
    x_pred = alpha x_t.
    """

    def __init__(
        self,
        image_channels: int,
        image_size: int,
        latent_channels: int,
        patch: int,
        channels: Sequence[int],
        num_blocks: Sequence[int],
        width: int,
        num_middle_blocks: int,
        head_dim: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.patch, self.latent_size = patch, image_size // (patch * 2 ** len(channels))
        self.logsnr_embedding = LogsnrEmbedding(width)
        self.embed = nn.Conv2d(image_channels * patch**2, channels[0], 3, padding=1)
        self.down, self.shrink, self.grow, self.up = (nn.ModuleList() for _ in range(4))
        below = [*channels[1:], width]
        for stage_width, next_width, blocks in zip(channels, below, num_blocks, strict=True):
            self.down.append(ConvStage(stage_width, stage_width, blocks, width))
            self.shrink.append(nn.Conv2d(stage_width, next_width, 2, stride=2))
            self.grow.append(nn.Conv2d(next_width, 4 * stage_width, 1))
            self.up.append(ConvStage(2 * stage_width, stage_width, blocks, width))
        self.embed_z = nn.Linear(latent_channels, width)
        self.position = nn.Parameter(grid_positions(self.latent_size, width))
        self.middle = Level(width, num_middle_blocks, head_dim, width, dropout)
        self.norm = nn.GroupNorm(num_groups(channels[0]), channels[0])
        self.out = nn.Conv2d(channels[0], image_channels * patch**2, 3, padding=1)
        self.carry = Modulation(width, 1, image_channels)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_t: Tensor, logsnr: Tensor, z_0: Tensor) -> Tensor:
        cond = self.logsnr_embedding(logsnr)  # b d
        h = self.embed(F.pixel_unshuffle(x_t, self.patch))
        skips = []
        for stage, shrink in zip(self.down, self.shrink, strict=True):
            h = stage(h, cond)
            skips.append(h)
            h = shrink(h)
        tokens = to_tokens(h) + self.embed_z(to_tokens(z_0)) + self.position  # b (h w) d
        h = to_grid(self.middle(tokens, cond), self.latent_size)
        for i in reversed(range(len(self.up))):
            h = F.pixel_shuffle(self.grow[i](h), 2)
            h = self.up[i](torch.cat([h, skips[i]], dim=1), cond)
        h = F.pixel_shuffle(self.out(F.silu(self.norm(h))), self.patch)
        return h + self.carry(cond)[:, 0, :, None, None] * x_t  # b c H W
