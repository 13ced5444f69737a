"""Time grids: their ends, their spacing, and published grids that they reproduce."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ul_runtime.samplers import GRID_NUMBERS, GRIDS, mix_grid

LOW, HIGH = -10.0, 5.0
each_grid = pytest.mark.parametrize("grid", list(GRIDS))


@each_grid
@given(num_steps=st.integers(1, 300), low=st.floats(-15.0, -1.0), span=st.floats(1.0, 25.0))
def test_a_grid_rises_from_one_end_to_the_other(grid, num_steps, low, span):
    nodes = GRIDS[grid](num_steps, low, low + span)
    assert len(nodes) == num_steps + 1
    assert (np.diff(nodes) > 0).all()
    assert nodes[[0, -1]] == pytest.approx([low, low + span], abs=1e-9)


MIX = {name: st.floats(*ends) for name, ends in GRID_NUMBERS["mix"].items()}


@given(num_steps=st.integers(1, 300), low=st.floats(-15.0, -1.0), span=st.floats(1.0, 25.0), **MIX)
def test_mix_rises_with_all_numbers_that_it_takes(num_steps, low, span, rho, centre, width):
    nodes = mix_grid(num_steps, low, low + span, rho, centre, width)
    assert (np.diff(nodes) > 0).all()
    assert nodes[[0, -1]] == pytest.approx([low, low + span], abs=1e-9)


SPACED = {
    "uniform": lambda logsnr: logsnr,
    "cosine": lambda logsnr: np.arctan(np.exp(-0.5 * logsnr)),
    "karras": lambda logsnr: np.exp(-0.5 * logsnr) ** (1 / 7),
    "flow": lambda logsnr: np.exp(-0.5 * logsnr) / (1 + np.exp(-0.5 * logsnr)),
}


@pytest.mark.parametrize("grid", SPACED)
def test_a_grid_is_evenly_spaced_in_its_own_time(grid):
    for other, time in SPACED.items():
        steps = np.diff(time(GRIDS[grid](100, LOW, HIGH)))
        assert np.allclose(steps, steps[0], rtol=1e-6) is (other == grid)


def test_mix_puts_its_nodes_where_its_two_distributions_have_their_mass():
    """The share of nodes between -2.5 and 1.5 for (0.5, -0.5, 1.5): half 4/15, half a logistic's, cut at both ends."""
    nodes = mix_grid(3000, LOW, HIGH, 0.5, -0.5, 1.5)
    low, left, right, high = (1 / (1 + np.exp(-(end + 0.5) / 1.5)) for end in (LOW, -2.5, 1.5, HIGH))
    expected = 0.5 * 4 / 15 + 0.5 * (right - left) / (high - low)
    assert ((nodes > -2.5) & (nodes < 1.5)).mean() == pytest.approx(expected, abs=1e-3)
    assert ((GRIDS["uniform"](3000, LOW, HIGH) > -2.5) & (nodes < 1.5)).mean() != pytest.approx(expected, abs=1e-1)


# Sabour, Fidler & Kreis 2024: sigma / alpha of the ten calls of the network
ALIGN_YOUR_STEPS = {
    (0.9, -1.0, 1.5): [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152],  # SD 1.5
    (0.4, 0.25, 1.5): [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113],  # SDXL
}


@pytest.mark.parametrize(("numbers", "within"), [((0.9, -1.0, 1.5), 0.04), ((0.4, 0.25, 1.5), 0.09)])
def test_mix_is_near_the_published_align_your_steps_grids(numbers, within):
    published = -2.0 * np.log(ALIGN_YOUR_STEPS[numbers])

    def rms(nodes: np.ndarray) -> float:
        return float(np.sqrt(np.mean((nodes - published) ** 2)))

    assert rms(mix_grid(9, published[0], published[-1], *numbers)) < within
    assert rms(mix_grid(9, published[0], published[-1])) > 2 * within
    assert rms(GRIDS["karras"](9, published[0], published[-1])) > 2 * within
