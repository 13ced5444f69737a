"""The graph of ul_runtime.backends.gpu_loop, built by onnx: what the bytes there have to be."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper


def pixels_onnx() -> bytes:
    nodes = [
        helper.make_node("Clip", ["x", "low", "high"], ["clipped"], name="clip"),
        helper.make_node("Add", ["clipped", "high"], ["shifted"], name="shift"),
        helper.make_node("Mul", ["shifted", "scale"], ["scaled"], name="scale"),
        helper.make_node("Round", ["scaled"], ["whole"], name="round"),
        helper.make_node("Transpose", ["whole"], ["last"], name="channels_last", perm=[0, 2, 3, 1]),
        helper.make_node("Cast", ["last"], ["images"], name="uint8", to=TensorProto.UINT8),
        helper.make_node("Abs", ["x"], ["magnitude"], name="magnitude"),
        helper.make_node("ReduceSum", ["magnitude", "axes"], ["sum"], name="sum", keepdims=0),
    ]
    constants = {"low": np.float32(-1), "high": np.float32(1), "scale": np.float32(127.5), "axes": np.arange(1, 4)}
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "c", "h", "w"])
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["b", "h", "w", "c"])
    total = helper.make_tensor_value_info("sum", TensorProto.FLOAT, ["b"])
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "pixels", [x], [images, total], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8, producer_name="")
    return model.SerializeToString(deterministic=True)
