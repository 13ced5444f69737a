"""The terms of the objective, their weights, their dimensions, and where their gradients go."""

import math
from dataclasses import replace

import pytest
import torch
from exact_denoisers import LATENT_SCHEDULE
from torch import nn

from ul_runtime.diffusion import Schedule, alpha, sigma, sigmoid
from ul_runtime.errors import UsageError
from ul_train import objective as ul
from ul_train.config import load_config
from ul_train.stage import Batch
from ul_train.stages import Base, Joint

OBJECTIVE = ul.Objective(
    LATENT_SCHEDULE, Schedule("cosine", -10.0, 10.0, 1.0), loss_factor=1.5, bias=-1.0, base_bias=2.0
)


def random_draws(num: int = 4, latent=(2, 2, 2), image=(1, 4, 4), seed: int = 0) -> ul.Draws:
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(num, *shape, generator=generator) for shape in (latent, latent, image)]
    times = [torch.rand(num, generator=generator) for _ in range(2)]
    return ul.Draws(t_z=times[0], eps_prior=noise[0], eps_z=noise[1], t_x=times[1], eps_x=noise[2])


def constant_v(value: float):
    return lambda z_t, logsnr, *given: torch.full_like(z_t, value)


def test_every_term_is_summed_over_dimensions_and_given_per_example():
    t = torch.tensor([0.2, 0.7])
    one = torch.full((2, 1, 1, 1), 0.3), torch.full((2, 1, 1, 1), -0.4)
    many = [values.expand(2, 3, 4, 5) for values in one]
    z_0, label = torch.zeros(2, 1, 1, 1), torch.zeros(2, dtype=torch.long)
    terms = {
        "prior": lambda x, eps: ul.prior_nats(constant_v(0.1), x, eps, t, LATENT_SCHEDULE),
        "decoder": lambda x, eps: ul.decoder_nats(constant_v(0.1), x, z_0, eps, t, OBJECTIVE),
        "base": lambda x, eps: ul.base_nats(constant_v(0.1), x, label, eps, t, OBJECTIVE),
    }
    for term in terms.values():
        assert torch.allclose(term(*many), 60 * term(*one), rtol=1e-5)
        assert term(*many).shape == (2,)


def test_every_term_is_positive():
    x, eps = torch.randn(64, 1, 2, 2), torch.randn(64, 1, 2, 2)
    t, label = torch.linspace(0, 1, 64), torch.zeros(64, dtype=torch.long)
    assert (ul.denoising_nats(constant_v(0.0), x, eps, t, LATENT_SCHEDULE) > 0).all()
    assert (ul.prior_nats(constant_v(0.0), x, eps, t, LATENT_SCHEDULE) > 0).all()
    assert (ul.decoder_nats(constant_v(0.0), x, x, eps, t, OBJECTIVE) > 0).all()
    assert (ul.base_nats(constant_v(0.0), x, label, eps, t, OBJECTIVE) > 0).all()


def test_a_denoising_term_is_half_the_slope_times_alpha_squared_v_error():
    x, eps, t = torch.randn(8, 2, 3, 3).double(), torch.randn(8, 2, 3, 3).double(), torch.linspace(0.0, 1.0, 8).double()
    schedule = OBJECTIVE.schedule_x
    level = schedule.logsnr(t).reshape(-1, 1, 1, 1)
    error = alpha(level) ** 2 * (alpha(level) * eps - sigma(level) * x - 0.25) ** 2
    expected = -0.5 * schedule.slope(t) * error.sum((1, 2, 3))
    assert torch.allclose(ul.denoising_nats(constant_v(0.25), x, eps, t, schedule), expected, rtol=1e-9)


def test_a_network_is_called_once_with_the_noisy_value_and_its_logsnr():
    seen = []

    def network(z_t, logsnr):
        seen.append((z_t, logsnr))
        return torch.zeros_like(z_t)

    x, eps, t = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.tensor([0.0, 0.5, 1.0])
    ul.denoising_nats(network, x, eps, t, LATENT_SCHEDULE)
    ((z_t, logsnr),) = seen
    assert logsnr.tolist() == [5.0, -2.5, -10.0]
    assert torch.equal(z_t, alpha(logsnr)[:, None, None, None] * x + sigma(logsnr)[:, None, None, None] * eps)


def test_a_bfloat16_network_leaves_the_loss_in_float32():
    x, eps, t = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.rand(3)
    nats = ul.prior_nats(lambda z_t, logsnr: 0.1 * z_t.bfloat16(), x, eps, t, LATENT_SCHEDULE)
    assert nats.dtype == torch.float32


def test_decoder_weight_is_loss_factor_times_sigmoid_of_bias_minus_logsnr():
    logsnr = torch.linspace(-30.0, 30.0, 61, dtype=torch.float64)
    expected = 1.7 / (1.0 + torch.exp(logsnr - 0.5))
    assert torch.allclose(ul.decoder_weight(logsnr, 1.7, 0.5), expected, rtol=1e-12)


def test_decoder_weight_on_x_mse_is_the_sigmoid_the_other_way_round():
    logsnr = torch.linspace(-20.0, 20.0, 41, dtype=torch.float64)
    on_mse = ul.decoder_weight(logsnr, 1.5, -1.0) * torch.exp(logsnr)
    assert torch.allclose(on_mse, 1.5 * math.exp(-1.0) * sigmoid(logsnr + 1.0), rtol=1e-12)


def test_negative_control_the_swapped_sigmoid_is_not_the_decoder_weight():
    logsnr = torch.linspace(-20.0, 20.0, 41, dtype=torch.float64)
    swapped = 1.5 * sigmoid(logsnr + 1.0)
    assert not torch.allclose(ul.decoder_weight(logsnr, 1.5, -1.0), swapped, rtol=0.1)


def test_a_nat_in_the_latent_and_in_the_decoder_cost_the_same_at_b_plus_log_c_minus_1():
    loss_factor, bias = 1.5, -1.0
    level = torch.tensor(bias + math.log(loss_factor - 1.0), dtype=torch.float64)
    assert float(ul.decoder_weight(level, loss_factor, bias)) == pytest.approx(1.0, rel=1e-12)


def test_coarse_noise_levels_weigh_more_than_fine_ones_and_never_more_than_loss_factor():
    weight = ul.decoder_weight(torch.linspace(-30.0, 30.0, 61), 1.5, -1.0)
    assert (weight.diff() <= 0).all()
    assert float(weight[0]) == pytest.approx(1.5)
    assert float(weight[-1]) < 1e-10


def test_decoder_and_base_terms_are_the_denoising_term_times_their_weights():
    x, eps, t = torch.randn(8, 1, 2, 2), torch.randn(8, 1, 2, 2), torch.rand(8)
    z_0, label = torch.randn(8, 1, 1, 1), torch.zeros(8, dtype=torch.long)
    for nats, schedule, scale, bias in (
        (ul.decoder_nats(constant_v(0.1), x, z_0, eps, t, OBJECTIVE), OBJECTIVE.schedule_x, 1.5, -1.0),
        (ul.base_nats(constant_v(0.1), x, label, eps, t, OBJECTIVE), OBJECTIVE.schedule_z, 1.0, 2.0),
    ):
        plain = ul.denoising_nats(constant_v(0.1), x, eps, t, schedule)
        weight = scale / (1.0 + torch.exp(schedule.logsnr(t) - bias))
        assert torch.allclose(nats, plain * weight, rtol=1e-5)


def test_the_decoder_is_given_z_0_and_the_base_its_label():
    given = []

    def network(x_t, logsnr, condition):
        given.append(condition)
        return torch.zeros_like(x_t)

    x, t, z_0, label = torch.randn(2, 1, 4, 4), torch.rand(2), torch.randn(2, 1, 2, 2), torch.tensor([3, 1])
    ul.decoder_nats(network, x, z_0, x, t, OBJECTIVE)
    ul.base_nats(network, x, label, x, t, OBJECTIVE)
    assert given[0] is z_0
    assert given[1] is label


def test_both_terms_of_the_loss_are_divided_by_the_number_of_image_values():
    _, (nats_prior, nats_decoder, _), x, loss = joint_parts()
    assert loss.item() == pytest.approx((nats_prior + nats_decoder).item() / x[0].numel())


def test_negative_control_means_per_element_would_weigh_the_prior_by_the_ratio_of_dimensions():
    _, (nats_prior, nats_decoder, z_clean), x, loss = joint_parts()
    image_values, latent_values = x[0].numel(), z_clean[0].numel()
    per_element = nats_prior / latent_values + nats_decoder / image_values
    prior_alone, prior_in_loss = nats_prior / latent_values, loss - nats_decoder / image_values
    assert prior_alone.item() == pytest.approx(prior_in_loss.item() * image_values / latent_values, rel=1e-4)
    assert loss.item() < 0.9 * per_element.item()


@pytest.mark.parametrize("logsnr_max", [3.0, 5.0, 10.0])
def test_z_0_has_the_noise_at_which_the_prior_ends(logsnr_max):
    schedule = Schedule("linear", -10.0, logsnr_max)
    z_clean, eps = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    expected = alpha(logsnr_max) * z_clean + sigma(logsnr_max) * eps
    assert torch.allclose(ul.noisy_latent(z_clean, eps, schedule), expected, rtol=1e-12)


def joint_parts(step: int = 2):
    """(networks with one weight each, (mean L_prior, mean L_decoder, z_clean), images, loss) of a batch of stage 1.

    The prior's gradient is ramped up until step 2.
    """
    torch.manual_seed(0)
    encoder, prior, decoder = nn.Conv2d(1, 2, 2, stride=2), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 1, 1)
    seen = []

    def encode(x):
        seen.append(encoder(x))
        return seen[0]

    def decode(x_t, logsnr, z_0):
        return nn.functional.interpolate(decoder(z_0), scale_factor=2) + 0.1 * x_t

    stage = Joint(load_config("tiny", ["objective.prior_ramp_steps=2"]), torch.device("cpu"), "fp32")
    stage.objective = OBJECTIVE
    stage.compute = {"encoder": encode, "prior": lambda z, logsnr: prior(z), "decoder": decode}
    torch.manual_seed(1)
    x = torch.randn(4, 1, 4, 4)
    loss, figures = stage.loss(Batch(x, torch.zeros(4).long(), random_draws()), step)
    return (encoder, prior, decoder), (figures["prior_nats"], figures["decoder_nats"], seen[0]), x, loss


def test_the_loss_is_of_the_prior_and_decoder_terms_of_one_encoding():
    (encoder, prior, decoder), (nats_prior, nats_decoder, z_clean), x, _ = joint_parts()
    draws = random_draws()
    z_0 = ul.noisy_latent(z_clean, draws.eps_z, LATENT_SCHEDULE)

    def decode(x_t, logsnr, z):
        return nn.functional.interpolate(decoder(z), scale_factor=2) + 0.1 * x_t

    expected = ul.prior_nats(lambda z, logsnr: prior(z), encoder(x), draws.eps_prior, draws.t_z, LATENT_SCHEDULE)
    assert torch.equal(nats_prior, expected.mean())
    assert torch.equal(nats_decoder, ul.decoder_nats(decode, x, z_0, draws.eps_x, draws.t_x, OBJECTIVE).mean())


def gradients(loss, *modules):
    return [torch.autograd.grad(loss.sum(), m.weight, retain_graph=True, allow_unused=True)[0] for m in modules]


def test_the_decoder_loss_reaches_encoder_and_decoder_and_not_the_prior():
    modules, (_, nats_decoder, _), _, _ = joint_parts()
    encoder, prior, decoder = gradients(nats_decoder, *modules)
    assert encoder.abs().min() > 0
    assert decoder.abs().min() > 0
    assert prior is None


def test_the_prior_loss_reaches_the_encoder_through_the_target_and_through_the_input():
    """No stop-gradient: the gradient is that of prior_nats as a function of z_clean, by finite differences."""
    z_clean, eps, t = (
        torch.randn(1, 1, 1, 1).double().requires_grad_(),
        torch.ones(1, 1, 1, 1).double(),
        torch.tensor([0.4]),
    )

    def nats(z):
        return ul.prior_nats(lambda z_t, logsnr: torch.tanh(z_t), z, eps, t.double(), LATENT_SCHEDULE)

    (gradient,) = torch.autograd.grad(nats(z_clean).sum(), z_clean)
    step = 1e-2  # the prediction is rounded to float32
    with torch.no_grad():
        difference = (nats(z_clean + step) - nats(z_clean - step)) / (2 * step)
    assert float(gradient) == pytest.approx(float(difference), rel=1e-3)


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.0)])
def test_prior_share_scales_what_the_prior_loss_sends_into_the_encoder_and_nothing_else(step, share):
    full_modules, (full_prior, full_decoder, _), _, _ = joint_parts()
    modules, (nats_prior, nats_decoder, _), _, _ = joint_parts(step)
    full, ramped = gradients(full_prior, *full_modules[:2]), gradients(nats_prior, *modules[:2])
    assert torch.allclose(ramped[0], share * full[0], rtol=1e-5, atol=1e-12)
    assert torch.equal(ramped[1], full[1])
    assert torch.equal(nats_prior, full_prior)
    decoder_gradients = gradients(nats_decoder, modules[0], modules[2])
    for given, expected in zip(
        decoder_gradients, gradients(full_decoder, full_modules[0], full_modules[2]), strict=True
    ):
        assert torch.equal(given, expected)


def base_inputs(z_clean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(what stage 2 shows its network at t = 0, the noise it drew) for an encoder that returns z_clean."""
    config = load_config("tiny", [])
    stage = Base(config, torch.device("cpu"), "fp32", 2, {"encoder": lambda x: z_clean})
    seen = []

    def record(z_t, logsnr, label):
        seen.append(z_t)
        return torch.zeros_like(z_t)

    stage.compute["base"] = record
    draws = random_draws(len(z_clean), config.latent_shape, config.image_shape)
    draws = ul.Draws(**vars(draws) | {"t_z": torch.zeros(len(z_clean))})
    stage.loss(Batch(torch.zeros(len(z_clean), *config.image_shape), torch.zeros(len(z_clean)).long(), draws), 0)
    return seen[0], draws.eps_prior


def test_stage_2_noises_the_clean_latent_once():
    z_clean = torch.randn(3, 2, 4, 4)
    z_t, eps = base_inputs(z_clean)
    assert torch.allclose(z_t, ul.noisy_latent(z_clean, eps, LATENT_SCHEDULE), rtol=1e-6)


def test_negative_control_a_z_0_noised_again_in_stage_2_is_seen():
    z_clean = torch.randn(3, 2, 4, 4)
    z_t, eps = base_inputs(ul.noisy_latent(z_clean, torch.randn_like(z_clean), LATENT_SCHEDULE))
    assert not torch.allclose(z_t, ul.noisy_latent(z_clean, eps, LATENT_SCHEDULE), atol=1e-2)


def test_the_cost_to_a_normal_prior_is_the_divergence_of_z_0():
    z_clean = torch.randn(3, 2, 4, 4).double()
    z_0 = torch.distributions.Normal(alpha(5.0) * z_clean, sigma(5.0))
    expected = torch.distributions.kl_divergence(z_0, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    assert torch.allclose(ul.normal_nats(z_clean, LATENT_SCHEDULE), expected, rtol=1e-9)


def test_with_a_normal_weight_the_prior_measures_and_the_encoder_pays_the_divergence():
    config = load_config("tiny", ["objective.normal_weight=0.25", "objective.prior_ramp_steps=10"])
    stage = Joint(config, torch.device("cpu"), "fp32")
    with torch.no_grad():  # last layers start at zero
        for parameter in stage.parameters.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    draws = random_draws(2, config.latent_shape, config.image_shape)
    x = torch.randn(2, *config.image_shape)
    loss, figures = stage.loss(Batch(x, torch.zeros(2, dtype=torch.long), draws), step=5)
    encoder = stage.modules["encoder"]
    z_clean = encoder(x)
    nats_prior, nats_decoder = figures["prior_nats"], figures["decoder_nats"]
    o, prior = stage.objective, stage.modules["prior"]
    measured = ul.prior_nats(prior, z_clean, draws.eps_prior, draws.t_z, o.schedule_z)
    assert nats_prior.item() == pytest.approx(measured.mean().item(), rel=1e-6)
    assert torch.autograd.grad(nats_prior, encoder.out.weight, retain_graph=True, allow_unused=True) == (None,)
    paid = (nats_decoder + 0.5 * 0.25 * ul.normal_nats(z_clean, LATENT_SCHEDULE).mean()) / x[0].numel()
    expected = torch.autograd.grad(paid, encoder.out.weight, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, encoder.out.weight)[0], expected)


def test_an_encoder_with_a_learned_variance_learns_it_from_all_terms_and_the_base_sees_its_draws():
    config = load_config("tiny", ["objective.learned_variance=true", "objective.prior_ramp_steps=0"])
    stage = Joint(config, torch.device("cpu"), "fp32")
    x, label = torch.randn(4, *config.image_shape), torch.zeros(4, dtype=torch.long)
    draws, eps = random_draws(4, config.latent_shape, config.image_shape), torch.randn(4, *config.latent_shape)
    loss, _ = stage.loss(Batch(x, label, draws, eps), step=1)
    encoder = stage.modules["encoder"]
    z_clean, nats = ul.drawn_latent(*encoder.moments(x), eps, stage.objective.schedule_z)
    o, z_0 = stage.objective, ul.noisy_latent(z_clean, draws.eps_z, stage.objective.schedule_z)
    nats_prior = ul.prior_nats(stage.modules["prior"], z_clean, draws.eps_prior, draws.t_z, o.schedule_z)
    nats_decoder = ul.decoder_nats(stage.modules["decoder"], x, z_0, draws.eps_x, draws.t_x, o)
    torch.testing.assert_close(loss, (nats_prior + nats_decoder + nats).mean() / x[0].numel())
    assert torch.autograd.grad(loss, encoder.spread.weight)[0].abs().max() > 0
    half = Batch(x, label, draws, eps).part(1, 2)
    assert torch.equal(half.eps_clean, eps[2:])
    base = Base(config, torch.device("cpu"), "fp32", 0, {"encoder": encoder})
    first, second = (base.loss(Batch(x, label, draws, noise), step=1)[0] for noise in (eps, -eps))
    assert not torch.equal(first, second)


def test_a_learned_variance_and_a_normal_weight_exclude_each_other():
    with pytest.raises(UsageError, match="exclude each other"):
        load_config("tiny", ["objective.learned_variance=true", "objective.normal_weight=1.0"])


def test_the_squared_error_is_of_one_step_from_pure_noise():
    objective = replace(OBJECTIVE, reconstruction="mse")
    x, eps, z_0 = (torch.randn(2, 1, 4, 4).double() for _ in range(3))
    given = []

    def decoder(x_t, logsnr, z):
        given.append((x_t, logsnr, z))
        return 0.3 * z

    nats = ul.decoder_nats(decoder, x, z_0, eps, torch.tensor([0.1, 0.6]), objective)
    noisiest = objective.schedule_x.ends[0]
    x_pred = alpha(noisiest) * eps - sigma(noisiest) * 0.3 * z_0
    expected = 1.5 / 2 * math.exp(-1.0) * ((x - x_pred) ** 2).sum((1, 2, 3))
    torch.testing.assert_close(nats, expected, rtol=1e-6, atol=0.0)
    ((x_t, logsnr, z),) = given
    assert torch.equal(x_t, eps)
    assert torch.equal(z, z_0)
    assert logsnr.tolist() == pytest.approx([noisiest] * 2)
