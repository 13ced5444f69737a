"""The ONNX Runtime backend: what it builds, when, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
from analytic_bundle import write_analytic_bundle
from safetensors.numpy import load, save

from ul_runtime.backends.choose import open_backend
from ul_runtime.backends.ort_cpu import OrtCpuBackend
from ul_runtime.bundle import Bundle
from ul_runtime.errors import BadInputError, ULError, UsageError

X = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)


def with_file(bundle: Bundle, name: str, data: bytes) -> Bundle:
    """The bundle as if `data` were the verified bytes of a file."""
    bundle._held[name] = data
    return bundle


def test_weights_come_from_the_verified_bytes(tmp_path):
    bundle = write_analytic_bundle(tmp_path / "bundle")
    kernel = load(bundle.read("encoder.safetensors"))["kernel"]
    for file in (tmp_path / "bundle").iterdir():
        file.unlink()
    z_clean = open_backend("auto", bundle).run("encoder", {"x": X})["z_clean"]
    blocks = X.reshape(2, 3, 4, 2, 4, 2)
    assert np.allclose(z_clean, np.einsum("bihkwl,oikl->bohw", blocks, kernel), atol=1e-6)


def test_a_graph_is_built_when_it_is_first_run(analytic_bundle):
    backend = OrtCpuBackend(Bundle.open(analytic_bundle))
    assert list(backend._sessions) == []
    backend.run("encoder", {"x": X})
    assert list(backend._sessions) == ["encoder"]


def test_a_graph_that_is_no_graph_is_named(analytic_bundle):
    bundle = with_file(Bundle.open(analytic_bundle), "encoder.onnx", b"not a graph")
    with pytest.raises(BadInputError, match="graph encoder cannot be loaded"):
        OrtCpuBackend(bundle).run("encoder", {"x": X})


@pytest.mark.parametrize(
    "weights",
    [
        {},
        {"kernel": np.zeros((4, 3, 2, 1), np.float32)},
        {"kernel": np.zeros((4, 3, 2, 2), np.float16)},
        {"kernel": np.zeros((4, 3, 2, 2), np.float32), "other": np.zeros(1, np.float32)},
    ],
)
def test_weights_that_do_not_fit_the_graph_are_refused(analytic_bundle, weights):
    bundle = with_file(Bundle.open(analytic_bundle), "encoder.safetensors", save(weights))
    with pytest.raises(BadInputError, match="graph encoder cannot be loaded"):
        OrtCpuBackend(bundle).run("encoder", {"x": X})


def test_weights_that_are_missing_are_not_looked_for_on_the_disk(analytic_bundle, monkeypatch):
    monkeypatch.chdir(analytic_bundle)
    assert Path("encoder.safetensors").exists()
    bundle = with_file(Bundle.open(analytic_bundle), "encoder.safetensors", save({}))
    with pytest.raises(BadInputError, match="graph encoder cannot be loaded"):
        OrtCpuBackend(bundle).run("encoder", {"x": X})


def test_an_input_that_does_not_fit_is_one_line_with_its_shape(analytic_bundle):
    with pytest.raises(ULError, match=r"encoder: ONNX Runtime failed on x float32\[2, 3, 8, 4\]"):
        OrtCpuBackend(Bundle.open(analytic_bundle)).run("encoder", {"x": X[..., :4]})


def test_spinning_and_threads_do_not_change_a_byte(analytic_bundle):
    bundle = Bundle.open(analytic_bundle)
    backends = [
        open_backend("ort-cpu", bundle, threads=threads, spinning=spinning)
        for threads, spinning in ((1, True), (2, False), (None, True))
    ]
    outputs = [backend.run("encoder", {"x": X})["z_clean"].tobytes() for backend in backends]
    assert len(set(outputs)) == 1
    with pytest.raises(UsageError, match="number of threads is 0"):
        open_backend("ort-cpu", bundle, threads=0)
