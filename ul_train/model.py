"""The four networks of a recipe, and a backend that runs their step graphs in torch."""

import copy
import hashlib

import numpy as np
import torch
from torch import nn

from ul_train.config import Config, PriorConfig
from ul_train.networks import DecoderUViT, Encoder, LatentViT
from ul_train.step import DecoderStep, PriorStep


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
    """z_t, logsnr, label -> v_pred; the prior of stage 2, which makes the pictures."""
    return _vit(config, config.base, num_classes)


def joint_networks(config: Config) -> dict[str, nn.Module]:
    """The networks of stage 1 by name, freshly initialised in this order."""
    return {"encoder": make_encoder(config), "prior": make_prior(config), "decoder": make_decoder(config)}


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


class Moments(nn.Module):
    """An encoder's mean and log of the variance, as a graph."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_variance = self.encoder.moments(x)  # type: ignore[operator]
        return mean, log_variance


class TorchBackend:
    """Runs the graphs of ul_runtime.pipeline with torch networks: numpy float32 in and out.

    `prior` is whichever prior is asked about: the base to sample, the prior of stage 1 to measure bits.
    """

    name = "torch"
    threads = None

    def __init__(
        self, encoder: nn.Module, prior: nn.Module, decoder: nn.Module, device: torch.device, precision: str = "fp32"
    ) -> None:
        self.device, self.precision = device, precision
        self.graphs: dict[str, nn.Module] = {
            "encoder": encoder,
            "prior_step": PriorStep(prior),
            "decoder_step": DecoderStep(decoder),
        }
        self.outputs = {
            "encoder": ("z_clean",),
            "prior_step": ("z_next", "pred"),
            "decoder_step": ("x_next", "pred"),
        }
        if getattr(encoder, "learned_variance", False):  # what no bundle has: it encodes by the mean
            self.graphs["moments"] = Moments(encoder)
            self.outputs["moments"] = ("z_clean", "log_variance")

    @torch.inference_mode()
    def run(self, graph_name: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs of a graph by name; networks run in evaluation mode."""
        graph = self.graphs[graph_name]
        if was_training := graph.training:
            graph.eval()
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(value)).to(self.device) for name, value in inputs.items()
        }
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            results = graph(**tensors)
        if was_training:
            graph.train()
        results = results if isinstance(results, tuple) else (results,)
        return {
            name: value.float().cpu().numpy() for name, value in zip(self.outputs[graph_name], results, strict=True)
        }


def in_precision(network: nn.Module, precision: str) -> nn.Module:
    """The network, or a copy with weights in bfloat16, which autocast would otherwise convert in every call."""
    if precision == "fp32":
        return network
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(torch.bfloat16)
    return network
