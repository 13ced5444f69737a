"""Magnitudes inside the networks: which are watched, and when a run is warned of float16's end."""

import json

import pytest
import torch
from tiny_run import new_run, tiny, train
from torch import nn

from ul_train.activations import warnings, watched
from ul_train.networks import ResidualBlock


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 4, 1)
        self.block = ResidualBlock(4, 4)

    def forward(self, x):
        return self.block(self.embed(x))


def test_the_largest_magnitude_of_a_block_is_that_of_any_of_its_layers_over_all_calls():
    network = Network()
    with torch.no_grad():
        network.embed.weight.fill_(3.0)
        network.embed.bias.fill_(0.0)
        network.block.conv_1.weight.zero_()
        network.block.conv_1.bias.fill_(-1000.0)  # inside the block; its norm hides it from what follows
    with watched({"n": network}) as largest, torch.no_grad():
        for scale in (2.0, 5.0, 1.0):
            network(torch.full((1, 1, 2, 2), scale))
    assert largest == {"n.embed": 15.0, "n.block": 1000.0}
    network(torch.full((1, 1, 2, 2), 100.0))
    assert largest["n.embed"] == 15.0, "only within"


def test_little_headroom_is_warned_of_and_much_is_not():
    ((block, text),) = warnings({"a": 65504 / 3.9, "b": 65504 / 4.1}, 100, {}, 0, 200)
    assert block == "a"
    assert text.startswith("a gives magnitudes up to 1.68e+04; float16 ends at 65504: ul-export --fp16")


def test_growth_that_ends_float16_before_the_run_does_is_warned_of():
    # 2^11 to 2^12 in 100 steps: four bits are left, which take 400 steps
    now, before = {"a": 4096.0}, {"a": 2048.0}
    ((_, text),) = warnings(now, 200, before, 100, 1000)
    assert "grew 2 times since step 100: at that rate it passes float16's 65504 at step 600" in text
    assert not list(warnings(now, 200, before, 100, 500)), "the run ends before"
    assert not list(warnings({"a": 512.0}, 200, {"a": 256.0}, 100, 10**6)), "far from the end"
    assert not list(warnings(now, 200, {"a": 4096.0}, 100, 10**6)), "does not grow"
    assert not list(warnings({"a": float("inf"), "b": 0.0}, 200, {"b": 1.0}, 100, 10**6))


@pytest.mark.slow
def test_a_run_logs_the_magnitudes_of_both_stages_and_warns(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("ul_train.activations.LARGEST_FLOAT16", 8.0)
    run = tmp_path / "run"
    train(new_run(run, tiny("run.eval_every=3")), "joint", "base")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for stage, block in (("joint", "largest.decoder.middle.blocks.0"), ("base", "largest.base.middle.blocks.0")):
        steps = [line["step"] for line in lines if line.get("stage") == stage and block in line]
        assert steps == [3, 6]
    assert any("float16 ends at 65504" in line.get("warning", "") for line in lines)
    said = [line for line in caplog.messages if "warning: stage joint" in line]
    assert "step 3: " in said[0]
    blocks = [line.split()[5] for line in said]
    assert len(blocks) == len(set(blocks)), "each once"
