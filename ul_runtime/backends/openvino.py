"""OpenVINO on the CPU, in float32 or bfloat16, and the only file that imports openvino.

Precision is asked for by name: OpenVINO's own default is bfloat16 wherever the CPU has it, without a word.
Same bytes at any batch size and position, but not at any number of threads, which a job therefore names.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

# openvino reports its own import to its maker over the network, unless the package that sends the report is missing.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

import openvino as ov  # noqa: E402
import openvino.opset13 as opset  # noqa: E402

from ul_runtime.backends import NO_BF16, HostBackend, cannot_load, check_threads, checked, run_failed  # noqa: E402
from ul_runtime.backends.onnx_weights import with_weights  # noqa: E402
from ul_runtime.errors import UsageError  # noqa: E402
from ul_runtime.threads import cores  # noqa: E402

if TYPE_CHECKING:
    from ul_runtime.bundle import Bundle
    from ul_runtime.manifest import GraphName


VERSION = str(ov.get_version()).split("-")[0]
_HINTS = {"fp32": "f32", "bf16": "bf16"}
_WAVES = ("Sin", "Cos")


@cache
def _core() -> ov.Core:
    """One for the process, never given up: others, when they go, leave a stack for signals that is not mapped."""
    return ov.Core()


def has_bf16() -> bool:
    """Whether this CPU computes in bfloat16 natively."""
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVinoBackend(HostBackend):
    """Runs a bundle's graphs on the CPU. A graph is compiled when it is first run.

    In bfloat16 it is compiled anew for each batch size, rounded up to a power of two, and kept: 1.2 to 1.4 times faster
    than one graph for all. Not in float32, where that gains up to a tenth at batch 1 and 4 and loses as much at 16.
    """

    name = "openvino"

    def __init__(self, bundle: "Bundle", precision: str, *, threads: int | None = None) -> None:
        """`threads` None = one per core. UsageError: a precision that OpenVINO or this CPU does not have."""
        if precision not in _HINTS:
            raise UsageError(f"openvino computes in {' or '.join(_HINTS)}, not in {precision}; give --precision")
        check_threads(threads)
        self.precision = precision
        self._bundle = bundle
        if precision == "bf16" and not has_bf16():
            raise UsageError(f"{NO_BF16}; give --precision fp32")
        # OpenVINO's threads do not wait for each other: a busy core costs no more than its share
        self.threads = threads or cores()
        self._lock = Lock()  # a request holds the inputs of one call
        self._graphs: dict[tuple[GraphName, tuple[tuple[str, int], ...]], _Graph] = {}

    def run(self, graph_name: "GraphName", inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See Backend.run. Raises BadInputError if the graph cannot be loaded, ULError if it fails."""
        batch = len(next(iter(inputs.values())))
        dims: dict[str, int] = {}
        if self.precision == "bf16":
            inputs = {name: _padded(array, 1 << (batch - 1).bit_length()) for name, array in inputs.items()}
            for tensor in self._bundle.manifest.all_graphs[graph_name].inputs:
                sizes = inputs[tensor.name].shape
                dims |= {d: size for d, size in zip(tensor.shape, sizes, strict=False) if isinstance(d, str)}
        key = graph_name, tuple(dims.items())
        with self._lock:
            if key not in self._graphs:
                self._graphs[key] = self._build(graph_name, dims)
            try:
                outputs = self._graphs[key].run(inputs)
            except (RuntimeError, ValueError, MemoryError) as error:
                raise run_failed("OpenVINO", graph_name, inputs, error) from error
        outputs = checked(self._bundle, graph_name, inputs, outputs)
        return {name: array[:batch] for name, array in outputs.items()}

    def _build(self, graph_name: "GraphName", dims: dict[str, int]) -> "_Graph":
        """Compile a graph: with these sizes of its dynamic dimensions, or with all sizes if there are none."""
        graph = self._bundle.manifest.all_graphs[graph_name]
        try:
            data = with_weights(self._bundle.graph(graph_name, float32=True), self._bundle.initializers(graph_name))
            model = _core().read_model(data)
            waves = None
            if dims:
                model.reshape({t.name: [d if isinstance(d, int) else dims[d] for d in t.shape] for t in graph.inputs})
            if self.precision == "bf16" and (taken := _take_out_waves(model)) is not None:
                waves = self._compile(taken, "fp32")
            return _Graph(self._compile(model, self.precision), waves)
        except (RuntimeError, ValueError, MemoryError) as error:
            advice = "export again with ul-export, or use --backend ort-cpu"
            raise cannot_load(self._bundle, graph_name, error, advice) from error

    def _compile(self, model: ov.Model, precision: str) -> ov.InferRequest:
        compiled = _core().compile_model(model, "CPU", _settings(precision, self.threads))
        if (got := compiled.get_property("INFERENCE_PRECISION_HINT").to_string()) != _HINTS[precision]:
            raise ValueError(f"OpenVINO computes in {got} and not in {precision}")
        return compiled.create_infer_request()


@dataclass(frozen=True)
class _Graph:
    """A compiled graph, and its sines and cosines if they are compiled apart."""

    main: ov.InferRequest
    waves: ov.InferRequest | None

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return _infer(self.main, inputs if self.waves is None else inputs | _infer(self.waves, inputs))


def _infer(request: ov.InferRequest, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    results = request.infer(inputs, share_inputs=True)
    return {name: array for output, array in results.items() for name in output.get_names()}


def _take_out_waves(model: ov.Model) -> ov.Model | None:
    """Make the sines and cosines of a model its inputs, and return the model that computes them, or None.

    They are of noise levels, at up to 80 radians: with angles in bfloat16 the error of a prior step is twice as large.
    """
    waves = {node.get_friendly_name(): node for node in model.get_ops() if node.get_type_name() in _WAVES}
    if not waves:
        return None
    apart = model.clone()
    outputs = [node.output(0) for node in apart.get_ops() if node.get_friendly_name() in waves]
    for output in outputs:
        output.set_names({output.get_node().get_friendly_name()})
    for name, node in waves.items():
        wave = opset.parameter(node.get_output_partial_shape(0), node.get_output_element_type(0), name)
        wave.output(0).set_names({name})
        node.output(0).replace(wave.output(0))
        model.add_parameters([wave])
    model.validate_nodes_and_infer_types()
    return ov.Model(outputs, apart.get_parameters())


def product(precision: str, threads: int, b: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The matrix product a b, each `n n`, with b as a weight: what the CPU can do at best in this precision."""
    a = opset.parameter(b.shape)
    model = ov.Model([opset.matmul(a, opset.constant(b), False, False)], [a])
    settings = _settings(precision, threads)
    request = _core().compile_model(model, "CPU", settings).create_infer_request()
    return lambda array: request.infer([array], share_inputs=True, share_outputs=True)[0]


def _settings(precision: str, threads: int) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # two processes would be pinned to the same cores
    }


def _padded(array: np.ndarray, size: int) -> np.ndarray:
    """`b ...` with the last row repeated up to `size` rows."""
    return np.concatenate([array, np.repeat(array[-1:], size - len(array), axis=0)]) if len(array) < size else array
