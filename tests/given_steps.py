"""The runtime's own loop over a step that is a Python function, from a state and with noise that are given."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ul_runtime.backends import HostBackend
from ul_runtime.loop import Loop, NoiseKeys, side_by_side
from ul_runtime.progress import Tick, silent

# (state b c h w, history b 2 c h w, noise b c h w, row b 8) -> (next state, prediction), all float32
Step = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
_START = 10**6  # a stream that no row has


@dataclass(frozen=True)
class GivenNoise(NoiseKeys):
    """`start` as the first state, and for row k `at_row(k)`."""

    start: np.ndarray
    at_row: Callable[[int], np.ndarray]

    def draw(self, streams: np.ndarray) -> np.ndarray:
        (stream,) = set(streams.tolist())
        if stream == _START:
            return self.start
        return self.at_row(stream) if stream >= 0 else np.zeros_like(self.start)


class Steps(HostBackend):
    """One graph of state "z"."""

    name, precision, threads = "steps", "fp32", None

    def __init__(self, step: Step) -> None:
        self.step = step

    def run(self, graph_name, inputs):
        state, pred = self.step(inputs["z"], inputs["history"], inputs["noise"], inputs["row"])
        return {"z_next": state, "pred": pred, "history_next": np.stack([pred, inputs["history"][:, 0]], axis=1)}


def run_steps(
    step: Step, table: np.ndarray, start: np.ndarray, noise: Callable[[int], np.ndarray], tick: Tick = silent
) -> np.ndarray:
    """The state `b c h w` after all rows of the table."""
    rows, streams = side_by_side([table] * len(start), lambda k: k)
    keys = GivenNoise(np.zeros(len(start), np.uint64), np.arange(len(start)), start.shape[1:], start, noise)
    loop = Loop("prior_step", "z", rows, streams, keys, _START, lambda k: {})
    return Steps(step).run_loops([loop], tick)[0]
