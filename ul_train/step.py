"""The step graphs as torch modules: what ul_export writes as ONNX, and what training previews run.

    (state, history, noise, row, condition) -> (next state, prediction)

Network, guidance, conversion of v to the clean value and the linear update of ul_runtime.samplers in one graph;
which sampler, how many steps, which grid and which guidance weight are data. All inputs and outputs are float32.
"""

from torch import Tensor, nn

from ul_runtime import samplers


def update(state: Tensor, pred: Tensor, history: Tensor, noise: Tensor, row: Tensor) -> Tensor:
    """a z + b_0 pred + b_1 pred_1 + b_2 pred_2 + s eps; history `b 2 c h w` newest first, row `b 8`."""
    c = row[:, :, None, None, None]
    earlier = c[:, samplers.B_1] * history[:, 0] + c[:, samplers.B_2] * history[:, 1]
    return c[:, samplers.A] * state + c[:, samplers.B_0] * pred + earlier + c[:, samplers.S] * noise


def clean_value(state: Tensor, v_pred: Tensor, row: Tensor) -> Tensor:
    """alpha z_t - sigma v_pred, with the row's alpha and sigma."""
    c = row[:, :, None, None, None]
    return c[:, samplers.ALPHA] * state - c[:, samplers.SIGMA] * v_pred


class PriorStep(nn.Module):
    """One step of the prior. `label` and `weight` are `b g`: the prediction is the weighted sum over g branches.

    g = 1, weight 1: no guidance. g = 2, labels (c, num_classes), weights (w, 1 - w): classifier-free guidance.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, z: Tensor, history: Tensor, noise: Tensor, row: Tensor, label: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        b, c, h, w = z.shape
        g = label.shape[1]
        branches = z[:, None].expand(b, g, c, h, w).reshape(b * g, c, h, w)
        logsnr = row[:, samplers.LOGSNR, None].expand(b, g).reshape(b * g)
        v_pred = self.network(branches, logsnr, label.reshape(b * g)).float().reshape(b, g, c, h, w)
        pred = clean_value(z, (weight[:, :, None, None, None] * v_pred).sum(dim=1), row)
        return update(z, pred, history, noise, row), pred


class DecoderStep(nn.Module):
    """One step of the decoder, conditioned on the noisy latent z_0."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, history: Tensor, noise: Tensor, row: Tensor, z_0: Tensor) -> tuple[Tensor, Tensor]:
        v_pred = self.network(x, row[:, samplers.LOGSNR], z_0).float()
        pred = clean_value(x, v_pred, row)
        return update(x, pred, history, noise, row), pred
