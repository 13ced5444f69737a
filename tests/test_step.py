"""The step modules that are exported: the linear update, the guidance, and whole walks over a table."""

import numpy as np
import pytest
import torch
from exact_denoisers import gaussian_mean, gaussian_v, walk
from given_steps import run_steps
from torch import Tensor, nn
from torch.export import Dim, export

from ul_runtime.diffusion import alpha, sigma, x_from_v
from ul_runtime.images.convert import to_uint8
from ul_runtime.samplers import B_0, B_1, B_2, SAMPLERS, A, S, sampler_table
from ul_train.networks import DecoderUViT, LatentViT
from ul_train.step_graphs import DecoderStep, Pixels, PriorStep, clean_value, rescale_std, update

BATCH, NO_LABEL = 3, 4


class LabelledGaussian(nn.Module):
    """An exact v-prediction for N(0, 0.5^2) latents that shifts with the label."""

    def forward(self, z_t: Tensor, logsnr: Tensor, label: Tensor) -> Tensor:
        return gaussian_v(0.5)(z_t, logsnr) + 0.1 * label[:, None, None, None]


def randomised(network: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval().requires_grad_(False)


def prior_network() -> nn.Module:
    torch.manual_seed(0)
    return randomised(LatentViT(2, 4, (32,), (1,), 16, NO_LABEL))


def state_inputs(shape: tuple[int, ...] = (2, 4, 4)) -> dict[str, Tensor]:
    """state, history, noise and one row of a different level for every example."""
    generator = torch.Generator().manual_seed(2)
    rows = np.array([[level, alpha(level), sigma(level), 0.9, 0.3, -0.2, 0.1, 0.5] for level in (-9.0, 0.0, 4.0)])
    return {
        "state": torch.randn(BATCH, *shape, generator=generator),
        "history": torch.randn(BATCH, 2, *shape, generator=generator),
        "noise": torch.randn(BATCH, *shape, generator=generator),
        "row": torch.from_numpy(rows).float(),
    }


def prior_step(
    network: nn.Module, label: Tensor, weight: Tensor, guide: Tensor | None = None, **off: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The step on `state_inputs`; `guide_weight` and `rescale` of all images, else 0."""
    given = state_inputs()
    state = given["state"], given["history"], given["noise"], given["row"]
    switches = (torch.full((BATCH,), off.get(name, 0.0)) for name in ("guide_weight", "rescale"))
    return PriorStep(network)(*state, label, weight, torch.zeros_like(state[0]) if guide is None else guide, *switches)


def guided(network: nn.Module, label: Tensor, weight: float) -> Tensor:
    labels = torch.stack([label, torch.full_like(label, NO_LABEL)], dim=1)
    return prior_step(network, labels, torch.tensor([[weight, 1.0 - weight]]).expand(BATCH, 2))[1]


def branch(network: nn.Module, label: Tensor) -> Tensor:
    return prior_step(network, label[:, None], torch.ones(BATCH, 1))[1]


def test_update_is_the_linear_formula_of_the_row():
    given = {name: value.numpy() for name, value in state_inputs().items()}
    pred = np.random.default_rng(0).normal(size=given["state"].shape).astype(np.float32)
    column = [given["row"][:, k].reshape(-1, 1, 1, 1) for k in range(8)]
    expected = column[A] * given["state"] + column[B_0] * pred + column[S] * given["noise"]
    expected = expected + column[B_1] * given["history"][:, 0] + column[B_2] * given["history"][:, 1]
    result = update(**state_inputs(), pred=torch.from_numpy(pred))
    assert np.allclose(result.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_clean_value_is_the_conversion_of_the_noise_process():
    given = state_inputs()
    v_pred, level = torch.randn_like(given["state"]), given["row"][:, 0].reshape(-1, 1, 1, 1)
    expected = x_from_v(given["state"], v_pred, level)
    assert torch.allclose(clean_value(given["state"], v_pred, given["row"]), expected, rtol=1e-5, atol=1e-6)


def test_prior_step_returns_the_update_by_its_own_prediction():
    given, label = state_inputs(), torch.tensor([0, 1, 2])
    z_next, pred, _ = prior_step(prior_network(), label[:, None], torch.ones(BATCH, 1))
    assert torch.allclose(z_next, update(**given, pred=pred), rtol=1e-6)


def test_prior_step_predicts_with_the_rows_logsnr_and_the_label():
    network, given, label = prior_network(), state_inputs(), torch.tensor([0, 1, 2])
    v_pred = network(given["state"], given["row"][:, 0], label)
    expected = clean_value(given["state"], v_pred, given["row"])
    assert torch.allclose(branch(network, label), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 1.0, 1.5, 7.0])
def test_guidance_is_the_unconditional_prediction_plus_weight_times_the_difference(weight):
    network, label = prior_network(), torch.tensor([0, 3, 2])
    conditional, unconditional = branch(network, label), branch(network, torch.full_like(label, NO_LABEL))
    expected = unconditional + weight * (conditional - unconditional)
    assert torch.allclose(guided(network, label, weight), expected, rtol=1e-4, atol=1e-5)


def test_one_branch_equals_two_of_which_the_second_has_no_weight():
    network, label = prior_network(), torch.tensor([0, 3, 2])
    assert torch.allclose(guided(network, label, 1.0), branch(network, label), rtol=1e-5, atol=1e-6)


def test_negative_control_guidance_changes_the_prediction():
    network, label = prior_network(), torch.tensor([0, 3, 2])
    assert not torch.allclose(guided(network, label, 1.5), branch(network, label), atol=1e-2)


def test_branches_keep_to_their_own_example():
    label = torch.tensor([[0, NO_LABEL], [1, NO_LABEL], [2, NO_LABEL]])
    weight = torch.tensor([[1.0, 0.0], [1.5, -0.5], [4.0, -3.0]])
    given = state_inputs()
    _, pred, _ = prior_step(LabelledGaussian(), label, weight)
    shift = 0.1 * (weight * label).sum(1)
    plain = gaussian_v(0.5)(given["state"], given["row"][:, 0])
    expected = clean_value(given["state"], plain + shift[:, None, None, None], given["row"])
    assert torch.allclose(pred, expected, rtol=1e-4, atol=1e-5)


# --- a guide, and the standard deviation


def bits(values: Tensor) -> list[int]:
    return values.numpy().view(np.int32).ravel().tolist()


def before_guides(network: nn.Module, label: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The step as it was when guidance had branches only."""
    given = state_inputs()
    z, row, (b, g) = given["state"], given["row"], label.shape
    branches = z[:, None].expand(b, g, *z.shape[1:]).reshape(b * g, *z.shape[1:])
    v_pred = network(branches, row[:, 0, None].expand(b, g).reshape(b * g), label.reshape(b * g))
    v_pred = v_pred.float().reshape(b, g, *z.shape[1:])
    pred = clean_value(z, (weight[:, :, None, None, None] * v_pred).sum(dim=1), row)
    return update(**given, pred=pred), pred


@pytest.mark.parametrize("guide", [0.0, 3.0, float("nan"), float("inf")])
@pytest.mark.parametrize("weight", [[1.0], [1.5, -0.5], [2.3, 1.0 - 2.3]])
def test_a_guide_without_weight_does_not_change_a_bit(guide, weight):
    network, label = prior_network(), torch.tensor([[0, NO_LABEL], [3, NO_LABEL], [2, NO_LABEL]])[:, : len(weight)]
    weights = torch.tensor([weight]).expand(BATCH, len(weight))
    results = prior_step(network, label, weights, torch.full_like(state_inputs()["state"], guide))[:2]
    for result, expected in zip(results, before_guides(network, label, weights), strict=True):
        assert bits(result) == bits(expected)


@pytest.mark.parametrize("value", [0.0, -0.0, 0.3])
def test_rescale_that_is_off_does_not_change_a_bit_of_a_flat_prediction(value):
    flat, other = torch.full((2, 3, 4, 4), value), torch.randn(2, 3, 4, 4)
    for cond in (flat, other):
        assert bits(rescale_std(flat, cond, torch.zeros(2))) == bits(flat)
    assert bits(rescale_std(other, flat, torch.zeros(2))) == bits(other)


def test_a_flat_prediction_that_has_no_std_to_rescale_stays_as_it_is():
    flat = torch.full((2, 3, 4, 4), 0.25)
    assert torch.equal(rescale_std(flat, torch.randn(2, 3, 4, 4), torch.tensor([0.5, 1.0])), flat)


def reference(
    pred: np.ndarray, guide: np.ndarray, weights: tuple[float, float], phi: float, axes: tuple[int, ...] = (1, 2, 3)
) -> np.ndarray:
    """w pred + (1 - w) guide, and phi std(pred) / std + 1 - phi of it."""
    guided = weights[0] * pred + weights[1] * guide
    std, cond = (values.std(axes, keepdims=True) for values in (guided, pred))
    return guided * (phi * cond / std + 1.0 - phi)


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("w", [0.0, 1.5, 4.0])
def test_a_guide_and_rescale_are_their_formulas(w, phi):
    network, label = prior_network(), torch.tensor([0, 3, 2])
    guide = torch.randn(BATCH, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    weight = torch.full((BATCH, 1), w)
    z_next, pred, _ = prior_step(network, label[:, None], weight, guide, guide_weight=1.0 - w, rescale=phi)
    alone = branch(network, label).double().numpy()
    expected = reference(alone, guide.double().numpy(), (w, 1.0 - w), phi)
    assert np.allclose(pred.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(z_next, update(**state_inputs(), pred=pred), rtol=1e-6)
    swapped = reference(alone, guide.double().numpy(), (1.0 - w, w), phi)
    assert not np.allclose(pred.numpy(), swapped, atol=1e-2)
    if phi and w:
        for axes in ((1,), (2, 3), (0, 1, 2, 3)):
            other = reference(alone, guide.double().numpy(), (w, 1.0 - w), phi, axes)
            assert not np.allclose(pred.numpy(), other, atol=1e-2)


def test_rescale_returns_to_the_std_of_the_first_branch():
    network, label = prior_network(), torch.tensor([0, 3, 2])
    labels = torch.stack([label, torch.full_like(label, NO_LABEL)], dim=1)
    weight = torch.tensor([[4.0, -3.0]]).expand(BATCH, 2)
    first, second = (branch(network, labels[:, k]).std(dim=(1, 2, 3)) for k in (0, 1))
    pred = prior_step(network, labels, weight, rescale=1.0)[1]
    assert torch.allclose(pred.std(dim=(1, 2, 3)), first, rtol=1e-4)
    assert not torch.allclose(pred.std(dim=(1, 2, 3)), second, rtol=1e-2)


def test_a_guide_equal_to_the_prediction_changes_nothing():
    network, label = prior_network(), torch.tensor([0, 3, 2])
    alone = branch(network, label)
    pred = prior_step(network, label[:, None], torch.full((BATCH, 1), 2.0), alone, guide_weight=-1.0)[1]
    assert torch.allclose(pred, alone, rtol=0.0, atol=1e-6)


# --- the decoder, and whole walks


def test_decoder_step_predicts_with_z_0_and_returns_the_update():
    torch.manual_seed(0)
    network = randomised(DecoderUViT(1, 8, 2, 2, (16,), (1,), width=32, num_middle_blocks=1, head_dim=16))
    given, z_0 = state_inputs((1, 8, 8)), torch.randn(BATCH, 2, 2, 2)
    x_next, pred, _ = DecoderStep(network)(given["state"], given["history"], given["noise"], given["row"], z_0)
    v_pred = network(given["state"], given["row"][:, 0], z_0)
    assert torch.allclose(pred, clean_value(given["state"], v_pred, given["row"]), rtol=1e-5, atol=1e-6)
    assert torch.allclose(x_next, update(**given, pred=pred), rtol=1e-6)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_a_whole_walk_of_the_step_module_is_the_closed_form_of_gaussian_latents(sampler):
    """Every walk over N(0, 0.5^2) latents is linear: the same numbers by a recursion in float64."""
    table = sampler_table(sampler, "mix", 12, logsnr_min=-10.0, logsnr_max=5.0, ends_clean=False)
    rng = np.random.default_rng(0)
    start, noises = rng.normal(size=(2, 1, 2, 2)), rng.normal(size=(len(table), 2, 1, 2, 2))
    module, label, weight = PriorStep(LabelledGaussian()), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
    no_guidance = torch.zeros(2, 1, 2, 2), torch.zeros(2), torch.zeros(2)

    def step(*arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        z_next, pred, _ = module(*(torch.from_numpy(array) for array in arrays), label, weight, *no_guidance)
        return z_next.numpy(), pred.numpy()

    result = run_steps(step, table, start.astype(np.float32), lambda k: noises[k].astype(np.float32))
    expected = walk(table, start, lambda z, logsnr: gaussian_mean(z, logsnr, 0.5), lambda k: noises[k])
    assert np.allclose(result, expected, rtol=1e-4, atol=1e-5)


def test_both_steps_export_with_any_batch_size_and_number_of_branches():
    batch, branches = Dim("b", min=1, max=64), Dim("g", min=1, max=4)
    given, label, weight = state_inputs(), torch.tensor([[0, 4], [1, 4], [2, 4]]), torch.full((BATCH, 2), 0.5)
    module = PriorStep(prior_network())
    state = (given["state"], given["history"], given["noise"], given["row"])
    arguments = (*state, label, weight, torch.rand_like(state[0]), torch.full((BATCH,), 0.3), torch.full((BATCH,), 0.7))
    shapes = (*[{0: batch}] * 4, *[{0: batch, 1: branches}] * 2, *[{0: batch}] * 3)
    program = export(module, arguments, dynamic_shapes=shapes).module()
    for rows, columns in ((BATCH, 2), (1, 1), (2, 1)):
        part = [value[:rows, :columns] if k in (4, 5) else value[:rows] for k, value in enumerate(arguments)]
        for result, expected in zip(program(*part), module(*part), strict=True):
            assert torch.allclose(result, expected, rtol=1e-4, atol=1e-5)


def test_the_next_history_is_this_prediction_and_the_one_before():
    given, label = state_inputs(), torch.tensor([[0], [1], [2]])
    _, pred, history = prior_step(prior_network(), label, torch.ones(BATCH, 1))
    assert torch.equal(history, torch.stack([pred, given["history"][:, 0]], dim=1))
    assert not torch.equal(history[:, 1], given["history"][:, 1])


def test_pixels_are_rounded_as_by_numpy_and_channels_come_last():
    x = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    images, total = Pixels()(x)
    assert images.numpy().tobytes() == to_uint8(x.numpy()).tobytes()
    assert torch.allclose(total, x.abs().sum(dim=(1, 2, 3)))
