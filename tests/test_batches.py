"""Batches are halved where memory is short, whatever says so, on a CPU as on a GPU."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from ul_runtime.backends import run_failed
from ul_runtime.backends.ort_cpu import OrtCpuBackend
from ul_runtime.batches import halved_where_short
from ul_runtime.bundle import Bundle
from ul_runtime.errors import OutOfMemoryError, ULError
from ul_runtime.pipeline import Pipeline


def short_above(most: int, error: BaseException) -> Any:
    def work(part: np.ndarray, size: int) -> list[int]:
        if len(part) > most:
            raise error
        return part.tolist()

    return work


@pytest.mark.case("F15")
@pytest.mark.parametrize("error", [MemoryError(), OutOfMemoryError("no memory is left")])
def test_a_batch_is_halved_until_it_fits_and_none_is_lost(error: BaseException) -> None:
    assert list(halved_where_short(7, 7, short_above(3, error))) == [[0, 1, 2], [3, 4, 5], [6]]
    with pytest.raises(OutOfMemoryError, match="not even one image fits"):
        list(halved_where_short(7, 7, short_above(0, error)))


@pytest.mark.case("F15")
def test_on_a_cpu_the_images_of_halved_batches_are_the_same(analytic_bundle: Path, caplog: Any) -> None:
    bundle = Bundle.open(analytic_bundle)

    class Small(OrtCpuBackend):
        """Has memory for two images."""

        def run(self, graph_name: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            if len(next(iter(inputs.values()))) > 2:
                raise run_failed("ONNX Runtime", graph_name, inputs, RuntimeError("... std::bad_alloc"))
            return super().run(graph_name, inputs)

    def drawn(backend: OrtCpuBackend) -> bytes:
        batches = Pipeline(bundle.manifest, backend).generate(5, steps=2, decoder_steps=2, batch_size=5)
        return np.concatenate([batch.x for batch in batches]).tobytes()

    assert drawn(Small(bundle, threads=1)) == drawn(OrtCpuBackend(bundle, threads=1))
    assert caplog.messages == [
        "prior_step: no memory is left for a batch of 5; give a smaller --batch-size; going on with batches of 2"
    ]


@pytest.mark.case("A16")
def test_a_graph_that_cannot_be_loaded_prints_nothing_on_stdout(
    analytic_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("a name that is no UTF-8")

    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", failing)
    with pytest.raises(ULError, match=r"cannot be loaded: a name that is no UTF-8"):
        OrtCpuBackend(Bundle.open(analytic_bundle), threads=1).run("encoder", {"x": np.zeros((1, 3, 8, 8), np.float32)})
    assert capsys.readouterr().out == ""
