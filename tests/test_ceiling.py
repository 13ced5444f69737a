"""The matrix products that are this machine's ceiling: they are products, and the best of them is taken."""

import numpy as np

from ul_export.bench.bench import ceilings, ort_product
from ul_runtime.backends import openvino

A, B = np.random.default_rng(0).standard_normal((2, 64, 64), np.float32)


def test_products_are_products() -> None:
    assert np.allclose(ort_product(1, B)(A), A @ B, atol=1e-4)
    assert not np.allclose(ort_product(1, B)(A), B @ A, atol=1e-4)  # the control
    assert np.allclose(openvino.product("fp32", 1, B)(A), A @ B, atol=1e-4)


def test_a_product_in_bfloat16_has_its_error_and_no_more() -> None:
    if openvino.has_bf16():
        gap = np.abs(openvino.product("bf16", 1, B)(A) - A @ B).max()
        assert 1e-3 < gap < 0.3


def test_every_precision_that_something_here_multiplies_in_has_a_ceiling() -> None:
    found = ceilings(1, {"fp32", "int8"}, 0.0)
    assert list(found) == ["fp32"]
    assert float(found["fp32"]["gflops_per_s"]) > 0
    assert str(found["fp32"]["by"]).startswith(("ONNX Runtime, ", "OpenVINO, "))
