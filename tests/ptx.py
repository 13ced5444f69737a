"""Runs the straight-line PTX of one kernel on the host, instruction by instruction, all threads of a grid at once.

Registers are uint64 patterns, one a thread. A branch may only go forward: its threads sleep until the label.
"""

import re
import struct
from collections.abc import Callable

import numpy as np

Registers = dict[str, np.ndarray]
_KINDS = {"u32": np.uint32, "b32": np.uint32, "s32": np.uint32, "u64": np.uint64, "b64": np.uint64, "s64": np.uint64}
_FLOATS = {"f64": np.float64, "f32": np.float32}
_INTEGERS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "add": np.add,
    "xor": np.bitwise_xor,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "shl": np.left_shift,
    "shr": np.right_shift,
    "mul.lo": np.multiply,
}


class Machine:
    """`memory`: arrays by their pretended addresses, which a thread may read and write within their bounds only."""

    def __init__(self, ptx: str, memory: dict[int, np.ndarray]) -> None:
        self.memory = {address: array.reshape(-1).view(np.uint8) for address, array in memory.items()}
        body = ptx[ptx.index("{") + 1 : ptx.rindex("}")]
        self.lines = [line.strip() for line in body.splitlines() if line.strip() and not line.strip().startswith(".")]
        self.names = re.findall(r"\.param \.u(?:32|64) (\w+)", ptx)

    def run(self, values: tuple[int, ...], grid: tuple[int, int], threads: int) -> None:
        """All threads of a grid of blocks x y, with these parameters."""
        x, y, thread = np.meshgrid(*(np.arange(n, dtype=np.uint64) for n in (*grid, threads)), indexing="ij")
        self.registers: Registers = {
            "%ctaid.x": x.reshape(-1),
            "%ctaid.y": y.reshape(-1),
            "%tid.x": thread.reshape(-1),
            "%ntid.x": np.full(x.size, threads, np.uint64),
            **{name: np.full(x.size, value, np.uint64) for name, value in zip(self.names, values, strict=True)},
        }
        awake, sleeping = np.ones(x.size, bool), {}
        for line in self.lines:
            if line.endswith(":"):
                awake = awake | sleeping.pop(line[:-1], False)
            elif branch := re.fullmatch(r"@(%p\d+) bra \t?(\S+);", line):
                goes = awake & (self.registers[branch[1]] != 0)
                sleeping[branch[2]] = sleeping.get(branch[2], False) | goes
                awake = awake & ~goes
            elif line != "ret;":
                operation, _, rest = line.rstrip(";").partition(" ")
                self._do(operation, [word.strip() for word in rest.split(",")], awake)
        assert not sleeping, "a branch went backwards"

    def _do(self, operation: str, words: list[str], awake: np.ndarray) -> None:
        name, _, kind = operation.rpartition(".")
        if name.startswith("ld.param"):
            self.registers[words[0]] = self.registers[words[1].strip("[]")]
        elif name in ("ld.global", "st.global"):
            self._access(name, kind, words, awake)
        elif name == "cvta.to.global" or name == "mov":
            self.registers[words[0]] = self._value(words[1])
        elif kind in _FLOATS and not name.startswith("cvt"):
            self._set(words[0], self._arithmetic(name, kind, words[1:]))
        else:
            self._set(words[0], self._integers(name, kind, words[1:]))

    def _arithmetic(self, name: str, kind: str, words: list[str]) -> np.ndarray:
        a, *b = (self._value(word).view(np.float64) for word in words)
        assert kind == "f64"
        if name == "abs":
            return np.abs(a)
        assert name.endswith(".rn"), f"{name}.{kind} may be fused with another operation"
        return {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name.removesuffix(".rn")](a, b[0])

    def _integers(self, name: str, kind: str, words: list[str]) -> np.ndarray:
        given = [self._value(word) for word in words]
        if name == "cvt.rn.f64":
            return given[0].astype(np.uint32).astype(np.float64)
        if name == "cvt.rn.f32":
            return given[0].view(np.float64).astype(np.float32).view(np.uint32).astype(np.uint64)
        a, *others = (value.astype(_KINDS[kind]) for value in given)
        if name in ("cvt.u32", "cvt.u64"):
            return a.astype(_KINDS[name[4:]])
        if name == "mad.lo":
            return a * others[0] + others[1]
        if name in ("mul.hi", "mul.wide"):
            wide = a.astype(np.uint64) * others[0].astype(np.uint64)
            return wide >> np.uint64(32) if name == "mul.hi" else wide
        if name == "setp.ge":
            return a >= others[0]
        return _INTEGERS[name](a, others[0])

    def _set(self, register: str, value: np.ndarray) -> None:
        self.registers[register] = value.view(np.uint64) if value.dtype == np.float64 else value.astype(np.uint64)

    def _value(self, word: str) -> np.ndarray:
        if word in self.registers:
            return self.registers[word]
        like = self.registers["%tid.x"]
        if word.startswith("0d"):
            return np.full(like.size, struct.unpack(">d", bytes.fromhex(word[2:]))[0]).view(np.uint64)
        return np.full(like.size, int(word) & (2**64 - 1), np.uint64)

    def _access(self, name: str, kind: str, words: list[str], awake: np.ndarray) -> None:
        place, other = (words[1], words[0]) if name == "ld.global" else (words[0], words[1])
        register, _, offset = place.strip("[]").partition("+")
        addresses = self.registers[register].astype(np.int64) + int(offset or 0)
        width = int(kind[1:]) // 8
        result = np.zeros((len(addresses), 8), np.uint8)
        values = self._value(other).view(np.uint8).reshape(-1, 8) if name == "st.global" else None
        for base, array in self.memory.items():
            at = addresses - base
            mine = awake & (at >= 0) & (at + width <= len(array))
            columns = at[mine, None] + np.arange(width)
            if values is None:
                result[mine, :width] = array[columns]
            else:
                array[columns] = values[mine, :width]
            awake = awake & ~mine
        assert not awake.any(), f"{name} outside of all memory"
        if values is None:
            self.registers[other] = result.view(np.uint64)[:, 0]
