"""What is measured, in which order, and what the figures are made of; no time is asserted."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ul_export.bench import measure
from ul_export.bench.measure import Runner, add_shares, in_turn, measure_runners, num_turns, pipeline_runner
from ul_runtime.backends import Backend, HostBackend
from ul_runtime.backends.choose import open_backend
from ul_runtime.bundle import Bundle
from ul_runtime.errors import StoppedError, ULError
from ul_runtime.settings import Overrides

OVERRIDES = Overrides(steps=5, decoder_steps=2, guidance=2.0)
STEPS = {"prior_step", "guided_prior_step", "decoder_step"}


@pytest.fixture(scope="module")
def bundle(analytic_bundle: Path) -> Bundle:
    return Bundle.open(analytic_bundle)


@pytest.fixture(scope="module")
def work(bundle: Bundle) -> measure.Work:
    return measure.work_of_an_image(bundle, 1, OVERRIDES)


def runner(bundle: Bundle, name: str, backend: Backend | None = None) -> Runner:
    return pipeline_runner(name, bundle.manifest, backend or open_backend("ort-cpu", bundle, threads=1), OVERRIDES)


class Wrong(HostBackend):
    """ONNX Runtime with 0.5 added to every prediction."""

    name, precision = "wrong", "bf16"

    def __init__(self, bundle: Bundle) -> None:
        self.backend = open_backend("ort-cpu", bundle, threads=1)

    def run(self, graph_name: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = self.backend.run(graph_name, inputs)
        return outputs | {"pred": outputs["pred"] + np.float32(0.5)}


def test_an_image_takes_the_steps_of_its_settings_and_the_sum_of_their_flops(work: measure.Work) -> None:
    counts = work.calls
    assert counts["prior_step"] + counts["guided_prior_step"] == 5
    assert counts["guided_prior_step"] == 1  # of the logsnr -10, -7, -4, -1, 2, that in [-3, 1.5]
    assert counts["decoder_step"] == 2
    decoder = 2 * (4 * 4 * 4) * (3 * 2 * 2)  # one transposed convolution
    assert work.as_dict()["steps"]["decoder_step"] == {"calls": 2, "flops": decoder}
    assert work.image_flops == 2 * decoder


def test_turns_go_round_and_a_warm_turn_runs_before_it_is_measured() -> None:
    ran: list[str] = []
    seconds = in_turn([lambda: ran.append("a"), lambda: ran.append("b")], 2)
    assert ran == ["a", "b", "a", "b"]
    assert [len(times) for times in seconds] == [2, 2]
    ran.clear()
    in_turn([lambda: ran.append("a"), lambda: ran.append("b")], 1, warm=True)
    first = ran.index("b")
    assert first > 1
    assert ran[:first] == ["a"] * first
    assert ran[first:] == ["b"] * (len(ran) - first)


def test_every_runner_gets_every_figure_at_every_batch_size(bundle: Bundle, work: measure.Work) -> None:
    turns: list[float] = []
    makers = [lambda: runner(bundle, "first"), lambda: runner(bundle, "second")]
    results = measure_runners(makers, work, (1, 3), 2, 2, turns.append)
    assert [(r["contender"], r["batch_size"]) for r in results] == [
        ("first", 1), ("second", 1), ("first", 3), ("second", 3),
    ]  # fmt: skip
    assert sum(turns) == num_turns(work, 4, 2, 2)
    for result in results:
        assert {key for key, part in result.items() if isinstance(part, dict)} == STEPS | {"images"}
        for step in STEPS:
            assert result[step].keys() == {"median_ms", "p95_ms", "repeats", "gflops_per_s", "largest_difference"}
            assert result[step]["repeats"] == 2
            assert result[step]["largest_difference"] == 0.0
            assert 0 < result[step]["median_ms"] <= result[step]["p95_ms"]
        images = result["images"]
        assert images["images_per_s"] == pytest.approx(1e3 * result["batch_size"] / images["median_ms"])
        flops = result["batch_size"] * work.image_flops
        assert images["gflops_per_s"] == pytest.approx(flops / images["median_ms"] / 1e6)
        assert images["loop_overhead"] > 0  # the graphs are a part of the whole
    json.dumps(results)


def test_a_runner_that_computes_something_else_is_seen(bundle: Bundle, work: measure.Work) -> None:
    makers = [lambda: runner(bundle, "first"), lambda: runner(bundle, "wrong", Wrong(bundle))]
    first, wrong = measure_runners(makers, work, (2,), 1, 1)
    for step in STEPS:
        assert (first[step]["largest_difference"], wrong[step]["largest_difference"]) == (0.0, pytest.approx(0.5))


def test_a_loop_that_cannot_be_taken_apart_gets_images_only(bundle: Bundle, work: measure.Work) -> None:
    made: list[int] = []
    loop = Runner("loop", "fp32", None, lambda batch, tick: made.append(batch))
    _, result = measure_runners([lambda: runner(bundle, "first"), lambda: loop], work, (2,), 1, 3)
    assert made == [2] * 4
    assert {key for key, part in result.items() if isinstance(part, dict)} == {"images"}
    assert "loop_overhead" not in result["images"]


def test_a_stop_ends_the_measurement_within_a_batch_of_images(bundle: Bundle, work: measure.Work) -> None:
    asked: list[bool] = []

    def stop(amount: float) -> None:
        asked.append(True)
        if len(asked) > 3:
            raise StoppedError("stopped")

    with pytest.raises(StoppedError):
        measure_runners([lambda: runner(bundle, "first")], work, (1, 3), 2, 2, stop)
    assert len(asked) == 4


def test_shares_are_of_the_ceiling_in_the_same_precision() -> None:
    results: list[dict[str, Any]] = [
        {"contender": name, "precision": precision, "batch_size": 1, "images": {"gflops_per_s": 50.0}}
        for name, precision in (("a", "fp32"), ("b", "bf16"))
    ]
    add_shares(results, {"fp32": {"gflops_per_s": 200.0, "by": "x"}})
    assert [result["images"]["of_ceiling"] for result in results] == [0.25, None]


def test_start_up_is_measured_in_fresh_processes(analytic_bundle: Path) -> None:
    figures = measure.start_up(analytic_bundle, "ort-cpu", None, 1)
    inside = sum(figures[key] for key in ("import_s", "load_s", "first_image_s", "next_image_s"))
    assert 0 < inside < figures["process_s"]
    beyond = figures["ul_generate_s"] - figures["next_image_s"]
    assert figures["ul_generate_beyond_sampling_s"] == pytest.approx(beyond, abs=0.002)


def test_a_fresh_process_that_fails_is_one_line() -> None:
    with pytest.raises(ULError, match=r"ended with 1: .*ValueError: no"):
        measure.fresh_process("raise ValueError('no')")


def test_what_is_printed_has_the_seconds_of_each_part(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    ticks = iter([10.0, 12.0, 15.0, 16.0])
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    measure.print_seconds(7.0, lambda: lambda: None)
    assert json.loads(capsys.readouterr().out) == {
        "import_s": 3.0, "load_s": 2.0, "first_image_s": 3.0, "next_image_s": 1.0,
    }  # fmt: skip
