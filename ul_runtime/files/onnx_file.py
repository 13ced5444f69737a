"""The bytes of an ONNX model as plain values, without the onnx package.

Only the fields that a graph of ul-export has are known; any other ends the reading. A graph inside a node is one of
those others, so nothing here is nested deeper than this table.
"""

from typing import Any

MAX_BYTES = 2**24  # of a graph without its weights
_MAX_FIELDS = 2**20
_MAX_VARINT = 63  # bits of its last shift
_END = "its bytes are cut or damaged"

Message = dict[str, Any]  # field -> value, or list of values; fields that are absent are not in it

# message -> {number: "name kind"}; a star after the name: repeated. From onnx.proto.
_TABLE = {
    "model": {
        1: "ir_version int",
        2: "producer_name text",
        3: "producer_version text",
        4: "domain text",
        5: "model_version int",
        6: "doc_string text",
        7: "graph graph",
        8: "opset_import* opset",
        14: "metadata_props* entry",
    },
    "opset": {1: "domain text", 2: "version int"},
    "entry": {1: "key text", 2: "value text"},
    "graph": {
        1: "node* node",
        2: "name text",
        5: "initializer* tensor",
        10: "doc_string text",
        11: "input* value",
        12: "output* value",
        13: "value_info* bytes",
        16: "metadata_props* entry",
    },
    "node": {
        1: "input* text",
        2: "output* text",
        3: "name text",
        4: "op_type text",
        5: "attribute* attribute",
        6: "doc_string text",
        7: "domain text",
        9: "metadata_props* entry",
    },
    "attribute": {
        1: "name text",
        2: "f float",
        3: "i int",
        4: "s bytes",
        5: "t tensor",
        7: "floats* float",
        8: "ints* int",
        9: "strings* bytes",
        13: "doc_string text",
        20: "type int",
    },
    "tensor": {
        1: "dims* int",
        2: "data_type int",
        4: "float_data* float",
        5: "int32_data* int",
        7: "int64_data* int",
        8: "name text",
        9: "raw_data bytes",
        12: "doc_string text",
        13: "external_data* entry",
        14: "data_location int",
        16: "metadata_props* entry",
    },
    "value": {1: "name text", 2: "type type", 3: "doc_string text", 4: "metadata_props* entry"},
    "type": {1: "tensor_type tensor_type", 6: "denotation text"},
    "tensor_type": {1: "elem_type int", 2: "shape shape"},
    "shape": {1: "dim* dim"},
    "dim": {1: "dim_value int", 2: "dim_param text", 3: "denotation text"},
}
_FIELDS: dict[str, dict[int, tuple[str, str, bool]]] = {
    message: {
        number: (text.split()[0].rstrip("*"), text.split()[1], "*" in text)  # name, kind, whether it is repeated
        for number, text in fields.items()
    }
    for message, fields in _TABLE.items()
}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf's wire types


def read_model(data: bytes) -> Message:
    """The model in these bytes. ValueError: none, damaged, too large, or with a field that ul-export never writes."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data)} bytes, at most {MAX_BYTES} are allowed")
    try:
        return _read(data, "model", [0])
    except IndexError:
        raise ValueError(_END) from None


def _read(data: bytes, kind: str, count: list[int]) -> Message:
    """A message of the table; `count` holds how many fields were read so far."""
    fields, at, end = _FIELDS[kind], 0, len(data)
    found: Message = {}
    value: Any
    while at < end:
        count[0] += 1
        if count[0] > _MAX_FIELDS:
            raise ValueError(f"more than {_MAX_FIELDS} fields")
        key, at = _varint(data, at) if data[at] > 127 else (data[at], at + 1)
        if key >> 3 not in fields:
            raise ValueError(f"a {kind} with field {key >> 3}, which ul-export never writes")
        name, of, repeated = fields[key >> 3]
        wire = key & 7
        if wire == _BYTES:
            size, at = _varint(data, at) if data[at] > 127 else (data[at], at + 1)
            value, at = data[at : at + size], at + size
            if of != "bytes":
                value = value.decode() if of == "text" else _packed(value, of, repeated, count)
        elif wire == _VARINT and of == "int":
            value, at = _varint(data, at)
            value = _signed(value)
        elif wire == _FIXED32 and of == "float":
            value, at = None, at + 4  # no check needs it
        else:
            raise ValueError(_END)
        if not repeated and name in found:
            raise ValueError(f"a {kind} with two of {name}")
        if not repeated:
            found[name] = value
        else:
            found.setdefault(name, []).extend(value if isinstance(value, list) else [value])
    if at > end:
        raise ValueError(_END)
    return found


def _packed(part: bytes, kind: str, repeated: bool, count: list[int]) -> Any:
    """A message, or several numbers, in the bytes of a field."""
    if kind in _FIELDS:
        return _read(part, kind, count)
    if not repeated:
        raise ValueError(_END)
    if kind == "float":
        return [None] * (len(part) // 4)
    numbers, at = [], 0
    while at < len(part):
        number, at = _varint(part, at)
        numbers.append(_signed(number))
    return numbers


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(number, where it ends). IndexError: at the end of the data."""
    number, shift = data[at] & 127, 0
    while data[at] > 127:
        at, shift = at + 1, shift + 7
        if shift > _MAX_VARINT:
            raise ValueError(_END)
        number |= (data[at] & 127) << shift
    return number, at + 1


def _signed(number: int) -> int:
    """Of 64 bits."""
    return (number & (2**64 - 1)) - (2**64 if number >> 63 & 1 else 0)
