"""The same solvers on the same nodes as diffusers' schedulers, whole walks over an exact denoiser that is not linear.

diffusers makes its nodes from a training schedule; here they are put in their place, in float64.
"""

from importlib.util import find_spec

import numpy as np
import pytest
from exact_denoisers import mixture_mean, walk
from test_solver_order import flow_endpoint, measured_orders, prior_table

from ul_runtime.diffusion import alpha
from ul_runtime.samplers import B_0, B_1, B_2, LOGSNR, A, S

pytestmark = pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed (extra dev)")

HIGH, STEPS = 5.0, 12
START = np.linspace(-2.0, 2.0, 9)
FLOAT64 = {"rtol": 1e-11, "atol": 1e-11}
FLOAT32 = {"rtol": 3e-6, "atol": 3e-6}  # DPMSolverMultistepScheduler.step computes in float32
NOISES = np.random.default_rng(0).normal(size=(STEPS, *START.shape))


def tensor(array: np.ndarray | float):
    import torch

    return torch.as_tensor(np.asarray(array, dtype=np.float64))


def nodes_of(table: np.ndarray) -> np.ndarray:
    return np.append(table[:, LOGSNR], HIGH)


def multistep(name: str, nodes: np.ndarray, **options):
    """A scheduler of diffusers with these nodes and no changes of order at the end."""
    import diffusers

    scheduler = getattr(diffusers, name)(
        prediction_type="sample", final_sigmas_type="sigma_min", lower_order_final=False, **options
    )
    scheduler.set_timesteps(len(nodes) - 1)
    scheduler.sigmas = tensor(np.exp(-0.5 * nodes))  # sigma / alpha
    return scheduler


def walk_of(scheduler, nodes: np.ndarray, **noise) -> np.ndarray:
    """The state after all steps of a scheduler, shape `1 n` for diffusers; `noise` is [n, ...] under its name."""
    z = tensor(START[None])
    for k, timestep in enumerate(scheduler.timesteps):
        pred = tensor(mixture_mean(z.numpy(), nodes[k]))
        extra = {key: tensor(values[k][None]) for key, values in noise.items()}
        z = scheduler.step(pred, timestep, z, **extra).prev_sample
    return z.numpy()[0]


def ours(table: np.ndarray) -> np.ndarray:
    return walk(table, START, mixture_mean, lambda k: NOISES[k])


def equal_but_not_with_a_wrong_weight(table: np.ndarray, theirs: np.ndarray, tolerance: dict[str, float]) -> None:
    assert np.allclose(ours(table), theirs, **tolerance)
    for column in [column for column in (A, B_0, B_1, B_2, S) if np.any(table[:, column])]:
        wrong = table.copy()
        wrong[STEPS // 2, column] *= 1.001
        assert not np.allclose(ours(wrong), theirs, **tolerance), column


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ancestral", 1.0)])
@pytest.mark.parametrize("grid", ["uniform", "mix"])
def test_ddim_and_ancestral_are_the_ddim_scheduler_with_eta_0_and_1(sampler, eta, grid):
    from diffusers import DDIMScheduler

    table = prior_table(sampler, STEPS, grid)
    nodes = nodes_of(table)
    scheduler = DDIMScheduler(num_train_timesteps=STEPS, prediction_type="sample", clip_sample=False)
    scheduler.set_timesteps(STEPS)
    scheduler.alphas_cumprod = tensor(alpha(nodes[:-1][::-1].copy()) ** 2)  # by timestep: cleanest first
    scheduler.final_alpha_cumprod = tensor(alpha(HIGH) ** 2)
    z = tensor(START)
    for k, timestep in enumerate(scheduler.timesteps):
        pred = tensor(mixture_mean(z.numpy(), nodes[k]))
        z = scheduler.step(pred, timestep, z, eta=eta, variance_noise=tensor(NOISES[k])).prev_sample
    equal_but_not_with_a_wrong_weight(table, z.numpy(), FLOAT64)


DPM = "DPMSolverMultistepScheduler"
PLUS, SDE = "dpmsolver++", "sde-dpmsolver++"
SAME = {
    "dpmpp2m": {"algorithm_type": PLUS, "solver_order": 2, "solver_type": "midpoint"},
    "ddim": {"algorithm_type": PLUS, "solver_order": 1},
    "ab2": {"algorithm_type": PLUS, "solver_order": 2, "solver_type": "heun"},
    "ancestral": {"algorithm_type": SDE, "solver_order": 1},
    "sa2": {"algorithm_type": SDE, "solver_order": 2, "solver_type": "heun"},  # their name for the exact integral
}


@pytest.mark.parametrize("sampler", SAME)
@pytest.mark.parametrize("grid", ["uniform", "mix"])
def test_a_sampler_is_the_dpm_solver_scheduler_of_its_kind(sampler, grid):
    table = prior_table(sampler, STEPS, grid)
    nodes = nodes_of(table)
    noise = {"variance_noise": NOISES} if sampler in ("ancestral", "sa2") else {}
    theirs = walk_of(multistep(DPM, nodes, **SAME[sampler]), nodes, **noise)
    equal_but_not_with_a_wrong_weight(table, theirs, FLOAT32)


def weights(scheduler, k: int) -> np.ndarray:
    """b_0, b_1, b_2 of the step from node k, in float64: the update is linear, so unit predictions show them."""
    order = scheduler.config.solver_order
    scheduler._step_index = k
    update = {
        2: scheduler.multistep_dpm_solver_second_order_update,
        3: scheduler.multistep_dpm_solver_third_order_update,
    }[order]
    found = np.zeros(3)
    for j in range(order):
        preds = [tensor(float(i == order - 1 - j)) for i in range(order)]  # theirs are oldest first
        found[j] = update(preds, sample=tensor(0.0), noise=tensor(0.0))
    return found


@pytest.mark.parametrize("sampler", ["dpmpp2m", "ab2", "sa2"])
@pytest.mark.parametrize("grid", ["uniform", "mix"])
def test_the_weights_of_order_2_are_theirs_in_float64(sampler, grid):
    table = prior_table(sampler, STEPS, grid)
    scheduler = multistep(DPM, nodes_of(table), **SAME[sampler])
    theirs = [weights(scheduler, k) for k in range(1, STEPS)]
    assert np.allclose(table[1:, [B_0, B_1, B_2]], theirs, rtol=1e-11, atol=1e-13)
    other = prior_table("ab2" if sampler == "dpmpp2m" else "dpmpp2m", STEPS, grid)
    assert not np.allclose(other[1:, [B_0, B_1, B_2]], theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("grid", ["uniform", "mix"])
def test_unipc2_is_the_unipc_scheduler_of_order_2(grid):
    table = prior_table("unipc2", STEPS, grid)
    nodes = nodes_of(table)
    theirs = walk_of(multistep("UniPCMultistepScheduler", nodes, solver_order=2, solver_type="bh2"), nodes)
    equal_but_not_with_a_wrong_weight(table, theirs, FLOAT64)


def test_negative_control_unipc2_is_not_the_unipc_scheduler_without_its_corrector():
    table = prior_table("unipc2", STEPS)
    nodes = nodes_of(table)
    options = {"solver_order": 2, "solver_type": "bh2", "disable_corrector": list(range(STEPS))}
    theirs = walk_of(multistep("UniPCMultistepScheduler", nodes, **options), nodes)
    assert np.allclose(ours(prior_table("dpmpp2m", STEPS)), theirs, **FLOAT64)
    assert not np.allclose(ours(table), theirs, atol=1e-3)


def second_difference(nodes: np.ndarray, k: int) -> np.ndarray:
    """What b_0, b_1, b_2 get from D2, the second divided difference, in DPM-Solver++(3M) as published.

    x_t = ... - alpha_t ((e^{-h} - 1 + h) / h^2 - 1/2) D2, of which the integral is twice as much;
    D2 = ((pred - pred_1) / r_0 - (pred_1 - pred_2) / r_1) / (r_0 + r_1).
    """
    h, h_0, h_1 = (0.5 * (nodes[j + 1] - nodes[j]) for j in (k, k - 1, k - 2))
    r_0, r_1 = h_0 / h, h_1 / h
    of_pred, of_pred_2 = 1.0 / (r_0 * (r_0 + r_1)), 1.0 / (r_1 * (r_0 + r_1))
    gain = -alpha(nodes[k + 1]) * ((np.expm1(-h) + h) / h**2 - 0.5)
    return gain * np.array([of_pred, -of_pred - of_pred_2, of_pred_2])


@pytest.mark.parametrize("grid", ["uniform", "mix"])
def test_dpm_solver_3m_as_published_has_half_the_second_difference_of_ab3(grid):
    table = prior_table("ab3", STEPS, grid)
    nodes = nodes_of(table)
    scheduler = multistep(DPM, nodes, algorithm_type=PLUS, solver_order=3)
    for k in range(2, STEPS):
        as_published, second = weights(scheduler, k), second_difference(nodes, k)
        assert np.allclose(table[k, [B_0, B_1, B_2]], as_published + second, rtol=1e-9, atol=1e-12)
        assert not np.allclose(table[k, [B_0, B_1, B_2]], as_published, rtol=1e-2)


def test_the_missing_half_costs_dpm_solver_3m_an_order():
    def as_published(num_steps: int) -> np.ndarray:
        table = prior_table("ab3", num_steps)
        for k in range(2, num_steps):
            table[k, [B_0, B_1, B_2]] -= second_difference(nodes_of(table), k)
        return table

    flow = START, flow_endpoint(START)
    assert measured_orders([as_published(n) for n in (256, 512)], flow) == pytest.approx(2.0, abs=0.05)
    assert measured_orders([prior_table("ab3", n) for n in (256, 512)], flow) == pytest.approx(3.05, abs=0.05)
