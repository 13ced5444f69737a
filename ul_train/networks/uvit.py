"""The diffusion decoder: a U-Net with a transformer on the latent grid in its middle (UViT, Hoogeboom et al. 2023)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ul_train.networks.layers import (
    LogsnrEmbedding,
    Modulation,
    ResidualBlock,
    grid_positions,
    num_groups,
    to_grid,
    to_tokens,
)
from ul_train.networks.vit import Level


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
