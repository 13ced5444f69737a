"""Newer weights into an engine that is there: seconds, where building takes minutes. Needs a card."""

from ul_runtime.errors import ULError
from ul_runtime.tensorrt.library import Library


def refit_engine(library: Library, engine: bytes, onnx: bytes, where: str) -> bytes:
    """The engine with the weights of `onnx`, which is the graph that it was built of but for these.

    ULError: the library cannot load the engine, or not all of its weights are in the graph.
    """
    api = library.api
    library.log.clear()
    loaded = api.Runtime(library.logger).deserialize_cuda_engine(engine)
    if loaded is None:
        raise ULError(f"{where}: {library.title} cannot load its engine: {library.last}")
    refitter = api.Refitter(loaded, library.logger)
    if not api.OnnxParserRefitter(refitter, library.logger).refit_from_bytes(onnx):
        raise ULError(f"{where}: {library.title} does not find the weights in the graph: {library.last}")
    if not refitter.refit_cuda_engine():
        missing = ", ".join(map(str, refitter.get_missing_weights()[:3])) or library.last
        raise ULError(f"{where}: {library.title} lacks weights: {missing}")
    return bytes(loaded.serialize())
