"""The prior and the base: a vision transformer over latents, of one or several levels of resolution."""

from collections.abc import Sequence

from torch import Tensor, nn

from ul_train.networks.layers import (
    LogsnrEmbedding,
    Modulation,
    TransformerBlock,
    grid_positions,
    merge_tokens,
    split_tokens,
    to_grid,
    to_tokens,
)


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
