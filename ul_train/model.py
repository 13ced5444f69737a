"""The four networks of a recipe."""

import hashlib

import torch
from torch import nn

from ul_train.config import Config, PriorConfig
from ul_train.networks import DecoderUViT, Encoder, LatentViT


def make_encoder(config: Config) -> Encoder:
    """Image -> z_clean."""
    c = config.encoder
    learned_variance = bool(config.objective.learned_variance)
    return Encoder(config.image.channels, config.latent_channels, c.patch, c.channels, c.blocks, learned_variance)


def make_decoder(config: Config) -> DecoderUViT:
    """x_t, logsnr, z_0 -> v_pred."""
    c = config.decoder
    return DecoderUViT(
        image_channels=config.image.channels,
        image_size=config.image.size,
        latent_channels=config.latent_channels,
        patch=c.patch,
        channels=c.channels,
        num_blocks=c.blocks,
        width=c.width,
        num_middle_blocks=c.middle_blocks,
        head_dim=c.head_dim,
        dropout=c.dropout,
    )


def _vit(config: Config, vit: PriorConfig, num_classes: int) -> LatentViT:
    return LatentViT(
        config.latent_channels, config.latent_size, vit.widths, vit.blocks, vit.head_dim, num_classes, vit.dropout
    )


def make_prior(config: Config) -> LatentViT:
    """z_t, logsnr -> v_pred; the prior of stage 1, which measures the bits; without labels."""
    return _vit(config, config.prior, 0)


def make_base(config: Config, num_classes: int) -> LatentViT:
    """z_t, logsnr, label -> v_pred; the prior of stage 2, which makes the images."""
    return _vit(config, config.base, num_classes)


def joint_networks(config: Config) -> dict[str, nn.Module]:
    """The networks of stage 1 by name, freshly initialised in this order."""
    return {"encoder": make_encoder(config), "prior": make_prior(config), "decoder": make_decoder(config)}


def sampled_networks(config: Config, num_classes: int) -> dict[str, nn.Module]:
    """The networks that a bundle has, by their place in sampling, freshly initialised."""
    return {"encoder": make_encoder(config), "prior": make_base(config, num_classes), "decoder": make_decoder(config)}


def randomise(network: nn.Module, seed: int) -> nn.Module:
    """Weights of no meaning, none of them zero, for tests and measurements; returns the network.

    Matrices and kernels are at the scale that keeps variance, all else is moved away from where it starts.
    """
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            noise = torch.randn(weight.shape, generator=draw)
            if weight.dim() >= 2 and name.endswith("weight"):
                weight.copy_(noise * weight[0].numel() ** -0.5)
            else:
                weight.add_(0.1 * noise)
    return network


def weights_sha256(network: nn.Module) -> str:
    """SHA-256 of a network's tensors and their names, whatever graph they are written into."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
