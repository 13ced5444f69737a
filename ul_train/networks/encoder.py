"""The encoder: image -> z_clean, deterministic (UL section 3)."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ul_train.networks.layers import ResidualBlock, num_groups

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
