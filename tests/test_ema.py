"""The moving average of weights against its closed form."""

import pytest
import torch
from torch import nn

from ul_train.stage import ema_decay_at, update_ema


def one_weight(value: float) -> nn.Module:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, value)
    return module


def test_average_of_constant_weights_forgets_its_start_geometrically():
    average, module = one_weight(0.0), one_weight(1.0)
    for _ in range(50):
        update_ema(average, module, 0.9)
    assert average.weight.item() == pytest.approx(1.0 - 0.9**50, rel=1e-5)


def test_average_is_the_geometric_sum_of_the_past():
    average, values = one_weight(0.5), [1.0, -2.0, 3.0, 0.25]
    for value in values:
        update_ema(average, one_weight(value), 0.8)
    expected = 0.5 * 0.8**4 + sum(0.2 * 0.8 ** (3 - k) * value for k, value in enumerate(values))
    assert average.weight.item() == pytest.approx(expected, rel=1e-5)


def test_average_leaves_the_weights_and_takes_no_gradient():
    average, module = one_weight(0.0), one_weight(1.0)
    update_ema(average, module, 0.9)
    assert module.weight.item() == 1.0
    assert average.weight.grad_fn is None


def test_every_parameter_is_averaged():
    torch.manual_seed(0)
    average, module = nn.Linear(3, 2), nn.Linear(3, 2)
    pairs = zip(average.parameters(), module.parameters(), strict=True)
    expected = [0.75 * a.detach() + 0.25 * p.detach() for a, p in pairs]
    update_ema(average, module, 0.75)
    assert all(torch.allclose(a, e) for a, e in zip(average.parameters(), expected, strict=True))


def test_decay_rises_to_its_value_so_that_the_start_is_forgotten():
    decays = [ema_decay_at(step, 0.999) for step in (0, 1, 10, 100, 10_000, 10_000_000)]
    assert decays == sorted(decays)
    assert decays[0] == pytest.approx(0.1)
    assert decays[2] == pytest.approx(11 / 20)
    assert decays[-1] == 0.999
