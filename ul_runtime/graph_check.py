"""A graph held against the manifest, from its bytes alone, before any engine sees it.

Hashes say that a bundle is whole, not that it is honest. A graph that passes can only compute: each operator makes
arrays of the arrays before it, once. No loop, no branch, no function, no operator of others, no file.
"""

from collections.abc import Collection, Mapping
from typing import Any, Final

from ul_runtime.errors import BadInputError, UntrustedError
from ul_runtime.files.onnx_file import Message, read_model
from ul_runtime.manifest import BundleInfo, Graph, GraphName, TensorFormat

MAX_NODES = 2**14
# Those that ul-export writes, and others of their kind, which another version of torch may write.
_OPERATORS = """
Cast Concat Constant DepthToSpace Expand Flatten Gather Identity Reshape Shape Slice SpaceToDepth Split Squeeze
Transpose Unsqueeze

Abs Add And Ceil Clip Cos Div Equal Erf Exp Floor Gelu Greater GreaterOrEqual Less LessOrEqual Log Max Min Mul Neg
Not Or Pow Reciprocal Relu Round Sigmoid Sign Sin Softplus Sqrt Sub Sum Tanh Where DequantizeLinear QuantizeLinear

Attention Conv ConvTranspose Gemm GroupNormalization InstanceNormalization LayerNormalization MatMul
RMSNormalization ReduceMax ReduceMean ReduceMin ReduceSum Resize Softmax
"""
OPERATORS: Final = frozenset(_OPERATORS.split())
_STANDARD = ("", "ai.onnx")  # domains
_TYPES = {1: "float32", 2: "uint8", 7: "int64"}  # TensorProto.DataType of inputs and outputs
_HALF = {10: "fp16", 16: "bf16"}
_MOST_COPIES = 64
_KEPT = ("Cast", "DequantizeLinear", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")  # the same values


def check_graph(data: bytes, name: GraphName, info: BundleInfo, where: str, *, float32: bool = False) -> None:
    """Refuse the ONNX bytes of a step graph that are not what the manifest says; `float32`: of its float32 twin.

    BadInputError: no ONNX, an operator that ul-export never writes, too many nodes, other inputs, outputs, opset,
    precision or number of classes. UntrustedError: values that lie in another file.
    """
    entry = info.all_graphs[name]
    try:
        model = read_model(data)
        _check_opset(model, entry)
        graph = model.get("graph", {})
        nodes = graph.get("node", [])
        _check_nodes(nodes)
        _check_places(graph, entry, where)
        _check_tensors("input", graph.get("input", []), entry.inputs)
        _check_tensors("output", graph.get("output", []), entry.outputs)
        _check_precision(nodes, "fp32" if float32 else entry.precision)
        if info.place_of(name) == "prior_step":
            _check_classes(graph, info.num_classes)
    except ValueError as error:
        raise BadInputError(f"{where}: not a graph of this bundle: {error}; export the bundle again") from error


def _check_opset(model: Message, entry: Graph) -> None:
    found = {each.get("domain", ""): each.get("version", 0) for each in model.get("opset_import", [])}
    for domain in found:
        if domain not in _STANDARD:
            raise ValueError(f"it asks for operators of {_shown(domain)}, beside ONNX's own")
    if list(found.values()) != [entry.opset]:
        raise ValueError(f"its opset is {list(found.values())}, the manifest says {entry.opset}")


def _check_nodes(nodes: list[Message]) -> None:
    if not 0 < len(nodes) <= MAX_NODES:
        raise ValueError(f"{len(nodes)} nodes; expected 1 to {MAX_NODES}")
    for node in nodes:
        if node.get("domain", "") not in _STANDARD or node.get("op_type") not in OPERATORS:
            what = ".".join(filter(None, (node.get("domain", ""), node.get("op_type", ""))))
            raise ValueError(f"node {_shown(node.get('name', ''))} is {_shown(what)}, which ul-export never writes")


def _check_places(graph: Message, entry: Graph, where: str) -> None:
    """Values lie in the graph, or weights in the one file of weights, each once."""
    tensors = graph.get("initializer", [])
    names = [tensor.get("name", "") for tensor in tensors]
    if len(set(names)) != len(names):
        raise ValueError("two initializers have the same name")
    constants = [at["t"] for node in graph["node"] for at in node.get("attribute", []) if "t" in at]
    for tensor, allowed in [*((each, True) for each in tensors), *((each, False) for each in constants)]:
        if not tensor.get("data_location") and not tensor.get("external_data"):
            continue
        place = {each.get("key"): each.get("value", "") for each in tensor.get("external_data", [])}
        if not allowed or place.get("location") != entry.weights or place.keys() - {"location", "offset", "length"}:
            name = _shown(tensor.get("name", ""))
            raise UntrustedError(f"{where}: values of {name} lie in {_shown(place.get('location', ''))}; do not use it")


def _check_tensors(kind: str, given: list[Message], expected: Collection[TensorFormat]) -> None:
    """Names, element types, ranks and fixed sizes are those of the manifest."""
    found = {each.get("name", ""): each for each in given}
    if len(found) != len(given) or found.keys() != {tensor.name for tensor in expected}:
        names = ", ".join(tensor.name for tensor in expected)
        raise ValueError(f"its {kind}s are {_shown(', '.join(found))}, the manifest says {names}")
    for tensor in expected:
        of: Message = found[tensor.name].get("type", {}).get("tensor_type", {})
        dims = [dim.get("dim_value", "?") for dim in of.get("shape", {}).get("dim", [])]
        wanted = [size if isinstance(size, int) else "?" for size in tensor.shape]
        dtype = _TYPES.get(of.get("elem_type", 0))
        if (dtype, dims) != (tensor.dtype, wanted):
            shown = f"{dtype or 'of another type'} {dims}"
            raise ValueError(f"{kind} {tensor.name} is {shown}, the manifest says {tensor.dtype} {wanted}")


def _check_precision(nodes: list[Message], precision: str) -> None:
    """What the graph computes in shows in its casts; one whose values are cast back at once only rounds."""
    found = "fp32"
    taken = {name for node in nodes if node["op_type"] != "Cast" for name in node.get("input", [])}
    for node in nodes:
        if node["op_type"] == "QuantizeLinear":
            found = "int8"
            break
        if node["op_type"] == "Cast" and not taken.isdisjoint(node.get("output", [])):
            to = next((at.get("i", 0) for at in node.get("attribute", []) if at.get("name") == "to"), 0)
            found = _HALF.get(to, found)
    if found != precision:
        raise ValueError(f"it computes in {found}, the manifest says {precision}")


def _check_classes(graph: Message, num_classes: int) -> None:
    """Each table that is looked up by the input `label` has a row for each class, and one for no label."""
    made_by = {output: node for node in graph["node"] for output in node.get("output", [])}
    rows = {each["name"]: each.get("dims", []) for each in graph.get("initializer", []) if each.get("name")}
    for node in graph["node"]:
        table, by = [*node.get("input", []), "", ""][:2]
        if node["op_type"] == "Gather" and _source(by, made_by) == "label":
            found = rows.get(_source(table, made_by), [])[:1]
            if found != [num_classes + 1]:
                raise ValueError(f"its table of labels has {found} rows, the manifest's classes need {num_classes + 1}")


def _source(name: str, made_by: Mapping[str, Any]) -> str:
    """The value that this one is a mere copy, cast or reshape of."""
    for _ in range(_MOST_COPIES):
        node = made_by.get(name)
        if node is None or node["op_type"] not in _KEPT or not node.get("input"):
            break
        name = node["input"][0]
    return name


def _shown(text: object) -> str:
    return ascii(str(text)[:100])
