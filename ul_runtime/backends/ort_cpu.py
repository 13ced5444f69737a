"""ONNX Runtime on the CPU: the default backend; onnxruntime is imported here and in ort_cuda.py."""

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from ul_runtime.backends import (
    ORT_GPU,
    REINSTALL_ORT_GPU,
    HostBackend,
    cannot_load,
    check_threads,
    checked,
    cpu_precision,
    run_failed,
)
from ul_runtime.errors import OutOfMemoryError, UsageError, is_out_of_memory
from ul_runtime.machine import versions
from ul_runtime.threads import free_threads

if TYPE_CHECKING:
    from ul_runtime.bundle import Bundle
    from ul_runtime.manifest import GraphName


try:
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as ort_state
except ImportError as error:
    if is_out_of_memory(error):
        raise OutOfMemoryError(f"no memory is left to load onnxruntime ({error}); free memory") from error
    advice = "pip install onnxruntime, or onnxruntime-gpu where there is an NVIDIA GPU"
    if ORT_GPU in versions([ORT_GPU]):  # whose files went with those of the other
        advice = REINSTALL_ORT_GPU
    raise UsageError(f"onnxruntime cannot be imported ({error}); {advice}") from error

VERSION = str(ort.__version__)
# ONNX Runtime's errors share no base class of their own
ORT_ERRORS = (
    ort_state.EPFail,
    ort_state.EngineError,
    ort_state.Fail,
    ort_state.InvalidArgument,
    ort_state.InvalidGraph,
    ort_state.InvalidProtobuf,
    ort_state.NoModel,
    ort_state.NoSuchFile,
    ort_state.NotImplemented,
    ort_state.RuntimeException,
)
# Weights that the bundle does not hand over must not be looked for on the disk: nothing is below a device file.
_NO_FOLDER = os.path.join(os.devnull, "no-files")

_BFLOAT16 = 16  # TensorProto.DataType
# This fused kernel sums on one thread: 0.5 ms for 1,024 tokens of width 192, against 0.1 ms of the two it replaces.
_SLOW_FUSIONS = ["SkipLayerNormFusion"]


class OrtCpuBackend(HostBackend):
    """Runs a bundle's graphs on the CPU. A session is built when its graph is first run."""

    name = "ort-cpu"
    threads = None  # of no effect on the bytes

    def __init__(
        self,
        bundle: "Bundle",
        *,
        precision: str | None = None,
        threads: int | None = None,
        allow_spinning: bool = True,
    ) -> None:
        """`precision` None = that of the bundle, float32 if it is half: CPUs know no such arithmetic.

        `threads` None = as many as cores are free, which is looked at again in each call: graphs are then loaded anew.
        `allow_spinning` False is kinder to a shared machine, 1-25 % slower.
        """
        check_threads(threads)
        self.precision = precision or cpu_precision(bundle.manifest)
        self._bundle = bundle
        self._threads = threads
        self._allow_spinning = allow_spinning
        self._sessions: dict[GraphName, tuple[int, ort.InferenceSession, list[ort.OrtValue]]] = {}

    def run(self, graph_name: "GraphName", inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See Backend.run. Raises BadInputError if the graph cannot be loaded, ULError if it fails."""
        _, session, _values = self._session(graph_name)  # it reads the weights from these values
        names = [output.name for output in session.get_outputs()]
        try:
            outputs = dict(zip(names, session.run(names, inputs), strict=True))
        except (*ORT_ERRORS, ValueError, RuntimeError, MemoryError) as error:
            raise run_failed("ONNX Runtime", graph_name, inputs, error) from error
        return checked(self._bundle, graph_name, inputs, outputs)

    def _session(self, graph_name: "GraphName") -> tuple[int, ort.InferenceSession, list[ort.OrtValue]]:
        threads = self._threads or free_threads()
        found = self._sessions.get(graph_name)
        if found is None or found[0] != threads:
            self._sessions.pop(graph_name, None)
            found = self._sessions[graph_name] = threads, *self.build(graph_name, self.options(threads))
        return found

    def options(self, threads: int) -> ort.SessionOptions:
        """Of this backend's sessions."""
        options = session_options(threads)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self._allow_spinning else "0")
        options.add_session_config_entry("session.force_spinning_stop", "1")  # or they hinder the next graph's threads
        return options

    def build(
        self, graph_name: "GraphName", options: ort.SessionOptions
    ) -> tuple[ort.InferenceSession, list[ort.OrtValue]]:
        """A session over a graph of the bundle, and its weights, which have to live as long. BadInputError."""
        cpu = ["CPUExecutionProvider"]
        return load_session(self._bundle, graph_name, self.precision == "fp32", options, cpu)


def load_session(
    bundle: "Bundle", graph_name: "GraphName", float32: bool, options: ort.SessionOptions, providers: list[Any]
) -> tuple[ort.InferenceSession, list[ort.OrtValue]]:
    """A session over a bundle's graph, and its weights, which have to live as long. BadInputError."""
    weights = bundle.initializers(graph_name)
    values = [_ort_value(array) for array in weights.values()]
    options.add_external_initializers(list(weights), values)
    try:
        model = bundle.graph(graph_name, float32=float32)
        session = ort.InferenceSession(
            model,
            options,
            providers=providers,
            disabled_optimizers=_SLOW_FUSIONS,
            enable_fallback=0,  # to a provider that was not asked for, said on stdout
        )
    except (*ORT_ERRORS, ValueError, RuntimeError, MemoryError) as error:
        raise cannot_load(bundle, graph_name, error, "export again with ul-export, or update onnxruntime") from error
    return session, values


def _ort_value(array: np.ndarray) -> ort.OrtValue:
    """A weight as ONNX Runtime holds it; uint16 is bfloat16, see Bundle.initializers."""
    array = np.ascontiguousarray(array)
    if array.dtype == np.uint16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)


def session_options(threads: int | None) -> ort.SessionOptions:
    """Of any session: so many threads (None = as cores are free now), nothing printed or looked for on the disk."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or free_threads()
    options.log_severity_level = 4  # errors come as exceptions
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", _NO_FOLDER)
    return options
