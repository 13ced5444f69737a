"""The one loop of every sampler: it walks the rows of a coefficient table and does no arithmetic of its own."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from ul_runtime.errors import StoppedError
from ul_runtime.samplers import S

# (state b c h w, history b 2 c h w, noise b c h w, row b 8) -> (next state, prediction), all float32
Step: TypeAlias = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def never() -> bool:
    """The `stop` of a loop that nobody stops."""
    return False


def run_steps(
    step: Step,
    table: np.ndarray,
    state: np.ndarray,
    noise_for_step: Callable[[int], np.ndarray],
    stop: Callable[[], bool] = never,
) -> np.ndarray:
    """The state `b c h w` (float32) after all rows of `table` `[rows, 8]` (samplers.ROW).

    `noise_for_step(k)` is asked only where row k draws noise. `stop` is asked before each step: StoppedError.
    """
    rows = table.astype(np.float32)
    batch = len(state)
    history = np.zeros((batch, 2, *state.shape[1:]), np.float32)
    silence = np.zeros_like(state)
    for k, row in enumerate(rows):
        if stop():
            raise StoppedError(f"stopped before step {k + 1} of {len(rows)}; run the same command again to go on")
        noise = noise_for_step(k) if row[S] != 0.0 else silence
        state, pred = step(state, history, noise, np.tile(row, (batch, 1)))
        history = np.stack([pred, history[:, 0]], axis=1)
    return state
