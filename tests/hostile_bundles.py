"""Bundles whose hashes are right and whose content is hostile: what is done to the parts of a good one.

Each function of CASES changes graphs, files or manifest; `Parts.write` makes the hashes right again.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnx import helper as h

PRIOR, DECODER, WEIGHTS = "prior_step.onnx", "decoder_step.onnx", "prior.safetensors"


@dataclass
class Parts:
    """A bundle in memory; `graphs` are written over `files`."""

    manifest: dict[str, Any]
    files: dict[str, bytes]
    graphs: dict[str, ModelProto] = field(default_factory=dict)

    @classmethod
    def of(cls, bundle: Path) -> "Parts":
        files = {path.name: path.read_bytes() for path in bundle.iterdir()}
        manifest = json.loads(files.pop("manifest.json"))
        graphs = {name: ModelProto.FromString(data) for name, data in files.items() if name.endswith(".onnx")}
        return cls(manifest, files, graphs)

    def write(self, path: Path) -> None:
        path.mkdir()
        files = self.files | {name: model.SerializeToString() for name, model in self.graphs.items()}
        for name, data in files.items():
            (path / name).write_bytes(data)
            self.manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        (path / "manifest.json").write_text(json.dumps(self.manifest, ensure_ascii=False))

    def raw(self, name: str, data: bytes) -> None:
        """These bytes in place of a graph."""
        del self.graphs[name]
        self.files[name] = data

    def tensors(self) -> tuple[dict[str, Any], bytes]:
        """Header and data of the prior's weights."""
        data = self.files[WEIGHTS]
        (length,) = struct.unpack("<Q", data[:8])
        return json.loads(data[8 : 8 + length]), data[8 + length :]

    def put_tensors(self, header: object, data: bytes = b"") -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        self.files[WEIGHTS] = struct.pack("<Q", len(text)) + text + data


Change = Callable[[Parts], object]


def constant(name: str, value: object) -> NodeProto:
    return h.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(value)))


def behind(output: str, *nodes: NodeProto, graph: str = PRIOR, type: int | None = None, open: bool = False) -> Change:
    """These nodes make `output` of `old`; declared as `type`, or with any shape."""

    def change(parts: Parts) -> None:
        model = parts.graphs[graph].graph
        for node in model.node:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    names[index] = "old" if name == output else name
        model.node.extend(nodes)
        for each in model.output:
            if each.name == output and type is not None:
                each.type.tensor_type.elem_type = type
            if each.name == output and open:
                each.type.tensor_type.ClearField("shape")

    return change


def model(change: Callable[[ModelProto], object], graph: str = PRIOR) -> Change:
    return lambda parts: change(parts.graphs[graph])


def manifest(change: Callable[[dict[str, Any]], object]) -> Change:
    return lambda parts: change(parts.manifest)


def in_all(old: int, new: int) -> Change:
    """A size of images or latents everywhere in the manifest."""

    def change(parts: Parts) -> None:
        for part in ("image", "latent"):
            if parts.manifest[part]["size"] == old:
                parts.manifest[part]["size"] = new
        for graph in parts.manifest["graphs"].values():
            for tensor in graph["inputs"] + graph["outputs"]:
                shape = tensor["shape"]
                tensor["shape"] = [new if size == old and shape.count(old) == 2 else size for size in shape]

    return change


def many_channels(parts: Parts) -> None:
    for tensor in [t for graph in parts.manifest["graphs"].values() for t in graph["inputs"] + graph["outputs"]]:
        if tensor["shape"].count(4) == 3:
            tensor["shape"] = [65536 if size == 4 else size for size in tensor["shape"]]
    parts.manifest["latent"] = {"channels": 65536, "size": 65536}


def big(make: NodeProto) -> Change:
    """A large array that the output waits for."""
    add = [h.make_node("ReduceMax", ["big"], ["most"], keepdims=0), h.make_node("Add", ["old", "most"], ["z_next"])]
    return behind("z_next", constant("size", np.array([1_500_000_000], np.int64)), make, *add)


def external(location: str, offset: int | None = 0, length: int | None = 16, dims: Sequence[int] = (4,)) -> TensorProto:
    tensor = TensorProto(name="evil", data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def takes(tensor: TensorProto, as_constant: bool = False) -> Change:
    """The output waits for a tensor whose values lie elsewhere."""

    def change(parts: Parts) -> None:
        add = [
            h.make_node("ReduceMax", ["evil"], ["most"], keepdims=0),
            h.make_node("Add", ["old", "most"], ["z_next"]),
        ]
        if as_constant:
            node = NodeProto(op_type="Constant", output=["evil"])
            node.attribute.add(name="value", type=AttributeProto.TENSOR).t.CopyFrom(tensor)
            add.insert(0, node)
        else:
            parts.graphs[PRIOR].graph.initializer.append(tensor)
        behind("z_next", *add)(parts)

    return change


def info(name: str, type: int = TensorProto.FLOAT, shape: Sequence[int] | None = None) -> onnx.ValueInfoProto:
    return h.make_tensor_value_info(name, type, shape)


def a_loop(parts: Parts) -> None:
    nodes = [h.make_node("Identity", ["c"], ["d"]), h.make_node("Identity", ["v"], ["w"])]
    inputs = [info("i", TensorProto.INT64, []), info("c", TensorProto.BOOL, []), info("v")]
    body = h.make_graph(nodes, "body", inputs, [info("d", TensorProto.BOOL, []), info("w")])
    loop = h.make_node("Loop", ["trip", "go", "old"], ["z_next"], body=body)
    behind("z_next", constant("trip", np.int64(10**12)), constant("go", True), loop)(parts)


def branches(parts: Parts) -> None:
    def leaf(name: str) -> onnx.GraphProto:
        return h.make_graph([h.make_node("Identity", ["old"], [name])], name, [], [info(name)])

    graph = leaf("o0")
    for k in range(1, 25):
        other = graph if k < 12 else leaf(f"e{k}")
        node = h.make_node("If", ["go"], [f"o{k}"], then_branch=graph, else_branch=other)
        graph = h.make_graph([node], f"g{k}", [], [info(f"o{k}")])
    node = h.make_node("If", ["go"], ["z_next"], then_branch=graph, else_branch=leaf("last"))
    behind("z_next", constant("go", True), node)(parts)


def functions(*made: tuple[str, list[str]]) -> Change:
    """Functions of a domain of their own, each calling those named, one after the other."""

    def change(parts: Parts) -> None:
        proto = parts.graphs[PRIOR]
        opsets = [h.make_opsetid("", 18), h.make_opsetid("evil", 1)]
        proto.opset_import.append(opsets[1])
        for name, calls in made:
            places = ["x", *(f"t{k}" for k in range(len(calls) - 1)), "y"]
            steps = zip(calls, places, places[1:], strict=False)
            nodes = [h.make_node(op, [a], [b], domain="" if op == "Identity" else "evil") for op, a, b in steps]
            proto.functions.append(h.make_function("evil", name, ["x"], ["y"], nodes, opsets))
        behind("z_next", h.make_node(made[-1][0], ["old"], ["z_next"], domain="evil"))(parts)

    return change


def epcontext(parts: Parts) -> None:
    proto = parts.graphs[PRIOR]
    proto.opset_import.append(h.make_opsetid("com.microsoft", 1))
    words = {"domain": "com.microsoft", "embed_mode": 0, "ep_cache_context": "/etc/passwd"}
    proto.graph.node.append(h.make_node("EPContext", ["z"], ["evil_out"], **words))  # type: ignore[arg-type]
    proto.graph.output.append(info("evil_out"))


def node(**fields: str) -> Change:
    """Fields of the fifth node."""
    return model(lambda proto: [setattr(proto.graph.node[5], name, value) for name, value in fields.items()])


def foreign_domain(proto: ModelProto) -> None:
    proto.opset_import.append(h.make_opsetid("evil.example", 1))
    proto.graph.node[5].domain = "evil.example"


def chain(parts: Parts) -> None:
    names = ["old", *(f"q{k}" for k in range(50_000)), "z_next"]
    behind("z_next", *(NodeProto(op_type="Identity", input=[a], output=[b]) for a, b in pairwise(names)))(parts)


def without_output(proto: ModelProto) -> None:
    kept = [each for each in proto.graph.output if each.name != "pred"]
    del proto.graph.output[:]
    proto.graph.output.extend(kept)


def renamed_output(parts: Parts) -> None:
    behind("z_next", h.make_node("Identity", ["old"], ["zz"]))(parts)
    for each in parts.graphs[PRIOR].graph.output:
        each.name = "zz" if each.name == "z_next" else each.name


def sequence_output(parts: Parts) -> None:
    behind("x_next", h.make_node("SequenceConstruct", ["old"], ["x_next"]), graph=DECODER)(parts)
    for each in parts.graphs[DECODER].graph.output:
        if each.name == "x_next":
            each.CopyFrom(h.make_tensor_sequence_value_info("x_next", TensorProto.FLOAT, None))


def channels_of_input(proto: ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 5


def entry_of_weights(change: Callable[[dict[str, Any]], object]) -> Change:
    """The entry of the table of classes in the header of the weights."""

    def apply(parts: Parts) -> None:
        header, data = parts.tensors()
        change(header)
        parts.put_tensors(header, data)

    return apply


def nan_weight(parts: Parts) -> None:
    header, data = parts.tensors()
    parts.put_tensors(header, np.float32("nan").tobytes() * (len(data) // 4))


def without_weight(parts: Parts) -> None:
    header, data = parts.tensors()
    last = max(header, key=lambda name: header[name]["data_offsets"][1])
    parts.put_tensors(header, data[: header.pop(last)["data_offsets"][0]])


def further_weight(parts: Parts) -> None:
    header, data = parts.tensors()
    more = {"more": {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}}
    parts.put_tensors(header | more, data + bytes(4))


def tile(output: str, times: list[int]) -> Change:
    nodes = constant("times", np.array(times, np.int64)), h.make_node("Tile", ["old", "times"], [output])
    return behind(output, *nodes, graph=DECODER, open=True)


def cast(type: int) -> Change:
    return behind("x_next", h.make_node("Cast", ["old"], ["x_next"], to=type), graph=DECODER, type=type)


def of_prior(**changes: object) -> Change:
    return manifest(lambda found: found["defaults"]["prior"].update(changes))


def in_graphs(**changes: object) -> Change:
    return manifest(lambda found: [graph.update(changes) for graph in found["graphs"].values()])


CANARY = "/etc/hostname"
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
REFUSED, NOT_TRUSTED, NOT_FINITE, HARMLESS = 65, 77, 76, 0
CASES: dict[str, tuple[int, Change]] = {
    "graphs swapped": (NOT_TRUSTED, lambda parts: parts.graphs.update({PRIOR: parts.graphs[DECODER]})),
    "weights swapped": (REFUSED, lambda parts: parts.files.update({WEIGHTS: parts.files["decoder.safetensors"]})),
    "an empty graph": (REFUSED, lambda parts: parts.raw(PRIOR, b"")),
    "no protobuf": (REFUSED, lambda parts: parts.raw(PRIOR, np.random.default_rng(0).bytes(30_000))),
    "opset 999": (REFUSED, model(lambda proto: setattr(proto.opset_import[0], "version", 999))),
    "IR version 99": (REFUSED, model(lambda proto: setattr(proto, "ir_version", 99))),
    "an unknown operator": (REFUSED, node(op_type="Nope")),
    "an operator of others": (REFUSED, model(foreign_domain)),
    "a compiled engine (EPContext)": (REFUSED, epcontext),
    "a loop of 10^12": (REFUSED, a_loop),
    "24 nested branches": (REFUSED, branches),
    "a function that calls itself": (REFUSED, functions(("F", ["F"]))),
    "functions of 2^30 nodes": (
        REFUSED,
        functions(("F0", ["Identity"]), *((f"F{k}", [f"F{k - 1}"] * 2) for k in range(1, 31))),
    ),
    "50,000 nodes": (REFUSED, chain),
    "a cycle": (
        REFUSED,
        behind("z_next", h.make_node("Add", ["old", "b"], ["z_next"]), h.make_node("Identity", ["z_next"], ["b"])),
    ),
    "an array of 1.5e9 values": (REFUSED, big(h.make_node("ConstantOfShape", ["size"], ["big"]))),
    "an array of 1e11 values": (REFUSED, big(h.make_node("ConstantOfShape", ["size"], ["big"]))),
    "an input repeated 60,000 times": (REFUSED, big(h.make_node("Tile", ["old", "size"], ["big"]))),
    "an output of one value": (
        REFUSED,
        behind("z_next", h.make_node("ReduceMean", ["old"], ["z_next"], keepdims=1)),
    ),
    "an image of 8 times the size": (REFUSED, tile("x_next", [1, 1, 8, 8])),
    "three images for one": (REFUSED, tile("x_next", [3, 1, 1, 1])),
    "an image of 8 times the size, by Concat": (
        REFUSED,
        behind("x_next", h.make_node("Concat", ["old"] * 8, ["x_next"], axis=2), graph=DECODER),
    ),
    "an output in float64": (REFUSED, cast(TensorProto.DOUBLE)),
    "an output of strings": (REFUSED, cast(TensorProto.STRING)),
    "an output that is a sequence": (REFUSED, sequence_output),
    "an output less": (REFUSED, model(without_output)),
    "an output renamed": (REFUSED, renamed_output),
    "an input more": (REFUSED, model(lambda proto: proto.graph.input.append(info("more", shape=[1])))),
    "an input of 5 channels": (REFUSED, model(channels_of_input)),
    "NaN for an image": (
        NOT_FINITE,
        behind("x_next", constant("n", np.float32("nan")), h.make_node("Mul", ["old", "n"], ["x_next"]), graph=DECODER),
    ),
    "values in an absolute path": (NOT_TRUSTED, takes(external(CANARY))),
    "values in ../": (NOT_TRUSTED, takes(external("../../canary.bin"))),
    "values in a/../../": (NOT_TRUSTED, takes(external("a/../../../canary.bin"))),
    "values in a device": (NOT_TRUSTED, takes(external("/dev/zero"))),
    "values in the environment": (NOT_TRUSTED, takes(external("/proc/self/environ"))),
    "values in weights of another graph": (NOT_TRUSTED, takes(external("decoder.safetensors", 8))),
    "values at an address": (NOT_TRUSTED, takes(external("*/_ORT_MEM_ADDR_/*", 4096))),
    "values in no file": (NOT_TRUSTED, takes(external("", None, None))),
    "values of 10^15 bytes": (REFUSED, takes(external(WEIGHTS, 0, 10**15))),
    "values at offset -1": (REFUSED, takes(external(WEIGHTS, -1))),
    "values past the end": (REFUSED, takes(external(WEIGHTS, 10**12))),
    "values of 10^18 numbers": (NOT_TRUSTED, takes(external(CANARY, dims=(10**9, 10**9)))),
    "a constant in a file": (NOT_TRUSTED, takes(external(CANARY), as_constant=True)),
    "a constant at an address": (NOT_TRUSTED, takes(external("*/_ORT_MEM_ADDR_/*", 4096), as_constant=True)),
    "a constant in the file of weights": (NOT_TRUSTED, takes(external(WEIGHTS), as_constant=True)),
    "an escape sequence for a node": (REFUSED, node(op_type="Nope", name="\x1b]0;pwned\x07\x1b[31mred")),
    "an escape sequence for a weight": (
        REFUSED,
        entry_of_weights(lambda header: header.update({"\x1b]0;pwned\x07": header.pop("class_mean")})),
    ),
    "a weight missing": (REFUSED, without_weight),
    "a weight more": (REFUSED, further_weight),
    "a weight of another shape": (REFUSED, entry_of_weights(lambda header: header["class_mean"].update(shape=[2, 8]))),
    "a weight of another type": (REFUSED, entry_of_weights(lambda header: header["class_mean"].update(dtype="I32"))),
    "a weight in float8": (
        REFUSED,
        entry_of_weights(lambda header: header["class_mean"].update(dtype="F8_E4M3", shape=[64])),
    ),
    "NaN for weights": (NOT_FINITE, nan_weight),
    "weights that overlap": (
        REFUSED,
        entry_of_weights(lambda header: header["variance"].update(data_offsets=header["class_mean"]["data_offsets"])),
    ),
    "a header of 100 MB": (REFUSED, lambda parts: parts.files.update({WEIGHTS: struct.pack("<Q", 10**8) + b"{}"})),
    "a header of 2^63 bytes": (REFUSED, lambda parts: parts.files.update({WEIGHTS: struct.pack("<Q", 2**63) + b"{}"})),
    "a header nested 10^6 deep": (REFUSED, lambda parts: parts.put_tensors(b'{"a":' + b"[" * 10**6)),
    "a shape of 2^64": (REFUSED, lambda parts: parts.put_tensors({"a": EMPTY | {"shape": [2**62, 4]}})),
    "a shape of 0 x 2^63": (REFUSED, lambda parts: parts.put_tensors({"a": EMPTY | {"shape": [0, 2**63]}})),
    "100,000 tensors": (REFUSED, lambda parts: parts.put_tensors({f"t{k}": EMPTY for k in range(100_000)})),
    "images said to be 65,536 px": (REFUSED, in_all(8, 65536)),
    "images said to be 8,192 px": (REFUSED, in_all(8, 8192)),
    "latents said to be 65,536 x 65,536 px": (REFUSED, many_channels),
    "latents said to be twice as large": (REFUSED, in_all(4, 8)),
    "noise from -1e308 to 1e308": (REFUSED, manifest(lambda found: found["logsnr_z"].update(min=-1e308, max=1e308))),
    "noise from -5000 to 5000": (REFUSED, manifest(lambda found: found["logsnr_x"].update(min=-5e3, max=5e3))),
    "guidance 1e300": (REFUSED, of_prior(guidance=1e300, guidance_interval=None)),
    "65,536 steps": (HARMLESS, of_prior(num_steps=65536)),
    "a thousand classes more": (
        REFUSED,
        manifest(lambda found: found["classes"].extend(f"c{k}" for k in range(1000))),
    ),
    "a class less": (REFUSED, manifest(lambda found: found["classes"].pop())),
    "said to be of opset 1": (REFUSED, in_graphs(opset=1)),
    "said to be fp16": (REFUSED, in_graphs(precision="fp16")),
    "said to be int8": (REFUSED, in_graphs(precision="int8")),
    "one file for two graphs": (
        NOT_TRUSTED,
        manifest(lambda found: found["graphs"]["prior_step"].update(file="encoder.onnx")),
    ),
    "a sampler that adds much noise": (HARMLESS, of_prior(sampler="sa2:10")),
    "a grid with NaN": (REFUSED, of_prior(grid="mix:nan,0,1")),
    "a grid of width 1e-300": (REFUSED, of_prior(grid="mix:1,0,1e-300")),
    "a name that runs from right to left": (REFUSED, manifest(lambda found: found.update(name="x\u202egnp.exe"))),
    "names of markup and other lines": (
        REFUSED,
        manifest(lambda found: found.update(name="a\u2028b", classes=["a/../x", "\u202e\u2066b", "<img src=x>"])),
    ),
}
