"""The graphs of a bundle as torch modules: what ul_export writes as ONNX, and what training previews run.

    (state, history, noise, row, condition) -> (next state, prediction, next history)

Network, guidance, conversion of v to the clean value and the linear update of ul_runtime.samplers in one graph;
which sampler, how many steps, which grid and which guidance are data. All inputs and outputs are float32.
"""

import torch
from torch import Tensor, nn

from ul_runtime import samplers


def update(state: Tensor, pred: Tensor, history: Tensor, noise: Tensor, row: Tensor) -> Tensor:
    """a z + b_0 pred + b_1 pred_1 + b_2 pred_2 + s eps; history `b 2 c h w` newest first, row `b 8`."""
    c = row[:, :, None, None, None]
    earlier = c[:, samplers.B_1] * history[:, 0] + c[:, samplers.B_2] * history[:, 1]
    return c[:, samplers.A] * state + c[:, samplers.B_0] * pred + earlier + c[:, samplers.S] * noise


def shifted(history: Tensor, pred: Tensor) -> Tensor:
    """The next call's history `b 2 c h w`: this prediction, and the one before it."""
    return torch.cat([pred[:, None], history[:, :1]], dim=1)


def clean_value(state: Tensor, v_pred: Tensor, row: Tensor) -> Tensor:
    """alpha z_t - sigma v_pred, with the row's alpha and sigma."""
    c = row[:, :, None, None, None]
    return c[:, samplers.ALPHA] * state - c[:, samplers.SIGMA] * v_pred


def toward_guide(pred: Tensor, guide: Tensor, weight: Tensor, signal: Tensor) -> Tensor:
    """pred + w (guide - alpha z_t): autoguidance on clean values (Karras et al. 2024, arXiv 2406.02507).

    `pred` is of branches that weigh 1 - w together, so w alpha z_t (`signal`) is still in it. w `b`, 0 = untouched.
    """
    w = weight[:, None, None, None]
    return torch.where(w == 0.0, pred, pred + w * (guide - signal))


def rescale_std(pred: Tensor, cond: Tensor, phi: Tensor) -> Tensor:
    """pred (phi std(cond) / std(pred) + 1 - phi), std over c h w: Lin et al. 2023 (arXiv 2305.08891), section 3.4.

    There of the network's output, here of the clean value. `phi` b, 0 = untouched; a flat `pred` stays as it is.
    """
    phi = phi[:, None, None, None]
    std = _std(pred)
    ratio = torch.where(std > 0.0, _std(cond) / std, 1.0)
    return torch.where(phi == 0.0, pred, pred * (phi * ratio + 1.0 - phi))


def _std(x: Tensor) -> Tensor:
    """b c h w -> b 1 1 1."""
    centred = x - x.mean(dim=(1, 2, 3), keepdim=True)
    return (centred * centred).mean(dim=(1, 2, 3), keepdim=True).sqrt()


class PriorStep(nn.Module):
    """One step of the prior. `label` and `weight` are `b g`: the prediction is the weighted sum over g branches.

    g = 1, weight 1: no guidance. g = 2, labels (c, num_classes), weights (w, 1 - w): classifier-free guidance.
    g = 1, weight w, and `guide` (another model's `pred` at this state) with `guide_weight` 1 - w: autoguidance.
    `rescale` is phi of rescale_std, to the prediction of branch 0. `guide_weight` and `rescale` are `b`, 0 = off.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        z: Tensor,
        history: Tensor,
        noise: Tensor,
        row: Tensor,
        label: Tensor,
        weight: Tensor,
        guide: Tensor,
        guide_weight: Tensor,
        rescale: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        b, c, h, w = z.shape
        g = label.shape[1]
        branches = z[:, None].expand(b, g, c, h, w).reshape(b * g, c, h, w)
        logsnr = row[:, samplers.LOGSNR, None].expand(b, g).reshape(b * g)
        v_pred = self.network(branches, logsnr, label.reshape(b * g)).float().reshape(b, g, c, h, w)
        pred = clean_value(z, (weight[:, :, None, None, None] * v_pred).sum(dim=1), row)
        pred = toward_guide(pred, guide, guide_weight, row[:, samplers.ALPHA, None, None, None] * z)
        pred = rescale_std(pred, clean_value(z, v_pred[:, 0], row), rescale)
        return update(z, pred, history, noise, row), pred, shifted(history, pred)


class DecoderStep(nn.Module):
    """One step of the decoder, conditioned on the noisy latent z_0."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, x: Tensor, history: Tensor, noise: Tensor, row: Tensor, z_0: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        v_pred = self.network(x, row[:, samplers.LOGSNR], z_0).float()
        pred = clean_value(x, v_pred, row)
        return update(x, pred, history, noise, row), pred, shifted(history, pred)


class Pixels(nn.Module):
    """Images uint8 `b h w c` of x `b c h w`, and the sum of its magnitudes, `b`: finite where all of x is."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        levels = ((x.clamp(-1.0, 1.0) + 1.0) * 127.5).round()
        return levels.permute(0, 2, 3, 1).to(torch.uint8), x.abs().sum(dim=(1, 2, 3))
