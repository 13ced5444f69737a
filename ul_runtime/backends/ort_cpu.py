"""ONNX Runtime on the CPU: the default backend, and the only file that imports onnxruntime."""

import os
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from ul_runtime.errors import BadInputError, ULError, UsageError

if TYPE_CHECKING:
    from ul_runtime.bundle import Bundle
    from ul_runtime.manifest import GraphName

# ONNX Runtime's errors share no base class of their own
_ORT_ERRORS = (
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


class OrtCpuBackend:
    """Runs a bundle's graphs on the CPU. A session is built when its graph is first run."""

    name = "ort-cpu"

    def __init__(self, bundle: "Bundle", *, threads: int | None = None, allow_spinning: bool = True) -> None:
        """`threads` None = one per core; `allow_spinning` False is kinder to a shared machine, 1-25 % slower."""
        if threads is not None and threads < 1:
            raise UsageError(f"the number of threads is {threads}; expected 1 or more")
        self._bundle = bundle
        self._threads = threads
        self._allow_spinning = allow_spinning
        self._sessions: dict[GraphName, ort.InferenceSession] = {}
        self._values: list[ort.OrtValue] = []  # sessions read the weights from here: same lifetime

    @property
    def precision(self) -> str:
        """Precision of the networks that make images: one for both, or "prior+decoder"."""
        graphs = self._bundle.manifest.graphs
        return "+".join(dict.fromkeys(graphs[name].precision for name in ("prior_step", "decoder_step")))

    def run(self, graph_name: "GraphName", inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See Backend.run. Raises BadInputError if the graph cannot be loaded, ULError if it fails."""
        session = self._session(graph_name)
        names = [output.name for output in session.get_outputs()]
        try:
            return dict(zip(names, session.run(names, inputs), strict=True))
        except (*_ORT_ERRORS, ValueError) as error:
            shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in inputs.items())
            raise ULError(f"{graph_name}: ONNX Runtime failed on {shapes}: {_one_line(error)}") from error

    def _session(self, graph_name: "GraphName") -> ort.InferenceSession:
        if graph_name not in self._sessions:
            self._sessions[graph_name] = self._build(graph_name)
        return self._sessions[graph_name]

    def _options(self) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = self._threads or 0
        options.log_severity_level = 4  # errors come as exceptions
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self._allow_spinning else "0")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", _NO_FOLDER)
        return options

    def _build(self, graph_name: "GraphName") -> ort.InferenceSession:
        weights = self._bundle.initializers(graph_name)
        values = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for array in weights.values()]
        options = self._options()
        options.add_external_initializers(list(weights), values)
        try:
            model = self._bundle.graph(graph_name)
            session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except (*_ORT_ERRORS, ValueError) as error:
            advice = "export again with ul-export, or update onnxruntime"
            message = f"{self._bundle.path}: graph {graph_name} cannot be loaded: {_one_line(error)}; {advice}"
            raise BadInputError(message) from error
        self._values += values
        return session


def _one_line(error: Exception, most: int = 300) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= most else text[:most] + "..."
