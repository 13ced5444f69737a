"""The random numbers of training: a step's depend on (seed, stage, step) alone, not on devices or restarts."""

from collections.abc import Sequence

import numpy as np
import torch

from ul_train.objective import Draws, low_discrepancy_times

STAGES = ("joint", "base", "evaluation")


def step_generator(seed: int, stage: str, step: int) -> torch.Generator:
    """A CPU generator for one step of one stage."""
    words = np.random.SeedSequence((seed, STAGES.index(stage), step)).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))


def draw_times(num: int, generator: torch.Generator) -> torch.Tensor:
    """Low-discrepancy times `num` in random order."""
    return low_discrepancy_times(torch.rand((), generator=generator), torch.randperm(num, generator=generator))


def draw_joint(num: int, latent_shape: Sequence[int], image_shape: Sequence[int], generator: torch.Generator) -> Draws:
    """Everything random in one batch of stage 1 but the flips."""
    return Draws(
        t_z=draw_times(num, generator),
        eps_prior=torch.randn((num, *latent_shape), generator=generator),
        eps_z=torch.randn((num, *latent_shape), generator=generator),
        t_x=draw_times(num, generator),
        eps_x=torch.randn((num, *image_shape), generator=generator),
    )


def flip_some(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror each image `b c h w` with chance one half."""
    flipped = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(flipped[:, None, None, None], x.flip(3), x)
