"""The registers, predicates and memory of one thread of a kernel, and the operands of its instructions.

Shared memory that only other threads of the warp fill reads as ones.
"""

from __future__ import annotations

import ctypes
import math
import re
import struct

from sass import Count, Instruction, Program, UnknownInstructionError

WORD = 0xFFFFFFFF
LONG = 0xFFFFFFFFFFFFFFFF
ONES = b"\x80\x3f"  # 1.0 in bfloat16; four bytes are 1.0019 in float32
BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def f32(bits: int) -> float:
    """The float32 of these bits."""
    (x,) = struct.unpack("<f", struct.pack("<I", bits & WORD))
    return float(x)


def bits_of(x: float) -> int:
    """The bits of x in float32; infinite where it overflows."""
    try:
        return int.from_bytes(struct.pack("<f", x), "little")
    except OverflowError:
        return 0x7F800000 if x > 0 else 0xFF800000


def as_signed(x: int, bits: int = 32) -> int:
    """The number that these bits are in two's complement."""
    return x - (1 << bits) if x >> (bits - 1) & 1 else x


def half(bits: int) -> float:
    """The float16 of these bits."""
    (x,) = struct.unpack("<e", struct.pack("<H", bits & 0xFFFF))
    return float(x)


def bits_of_half(x: float) -> int:
    """The bits of x in float16; infinite where it overflows."""
    try:
        return int.from_bytes(struct.pack("<e", x), "little")
    except OverflowError:
        return 0x7C00 if x > 0 else 0xFC00


class ThreadState:
    """One thread of a kernel, and the instructions that read and write memory.

    Args:
        program: from `programs`.
        constants: bank 0 by offset, the kernel's parameters included.
        thread, block: threadIdx.x and blockIdx.x.
        limit: instructions after which a loop is assumed not to end.
    """

    def __init__(
        self,
        program: Program,
        constants: dict[int, bytes],
        *,
        thread: int = 0,
        block: int = 0,
        limit: int = 5_000_000,
    ) -> None:
        self.program, self.limit = program, limit
        self.bank = bytearray(max(offset + len(data) for offset, data in constants.items()))
        for offset, data in constants.items():
            self.bank[offset : offset + len(data)] = data
        self.special = {
            "SR_TID.X": thread, "SR_CTAID.X": block, "SR_CgaCtaId": 0, "SR_LANEID": thread % 32,
            "SRZ": 0, "SR_SWINHI": 0, "SR_TID.Y": 0, "SR_TID.Z": 0, "SR_CTAID.Y": 0, "SR_CTAID.Z": 0,
        }  # fmt: skip
        self.registers: dict[str, int] = {}
        self.predicates: dict[str, bool] = {}
        self.shared: dict[int, int] = {}  # byte by byte
        self.stored: dict[int, int] = {}  # to global memory
        self.local: dict[int, int] = {}
        self.barrier_result = False
        self.count = Count()

    # ---- operands ----------------------------------------------------------------------------------------------------

    def _predicate(self, name: str) -> bool:
        if name.startswith("!"):
            return not self._predicate(name[1:])
        return True if name in ("PT", "UPT") else self.predicates.get(name, False)

    def _set_predicate(self, name: str, value: int) -> None:
        if name not in ("PT", "UPT"):
            self.predicates[name] = bool(value)

    def _constant(self, offset: int, size: int) -> int:
        data = bytes(self.bank[offset : offset + size])
        return int.from_bytes(data.ljust(size, b"\0"), "little")

    def _value(self, operand: str, bits: int = 32) -> int:
        """An integer operand, or the bits of a float, of 32 or 64 bits."""
        text = operand.replace(".reuse", "")
        mask = LONG if bits == 64 else WORD
        if text.startswith("-"):
            return -self._value(text[1:], bits) & mask
        if text.startswith("~"):
            return self._value(text[1:], bits) ^ mask
        text = re.sub(r"\.(64|H0_H0|H1_H1|H0|H1|F32|U32|S32|X4|X8|X16)$", "", text)
        if text in ("RZ", "URZ", "SRZ"):
            return 0
        if found := re.fullmatch(r"(U?R\d+)\.B([0-3])", text):
            return self._value(found[1]) >> 8 * int(found[2]) & 0xFF
        if found := re.fullmatch(r"(U?R)(\d+)", text):
            low = self.registers.get(text, 0)
            return low | self.registers.get(f"{found[1]}{int(found[2]) + 1}", 0) << 32 if bits == 64 else low
        if found := re.fullmatch(r"c\[0x0\]\[(.+)\]", text):
            return self._constant(self._address(found[1]), bits // 8)
        if re.fullmatch(r"-?0x[0-9a-f]+", text):
            return int(text, 16) & mask
        if re.fullmatch(r"c\[0x3\]\[.+\]", text):
            return 0  # a table in the source: data, which no branch depends on
        if found := re.fullmatch(r"c\[0x([0-9a-f]+)\]\[.+\]", text):
            raise UnknownInstructionError(f"constant bank {found[1]}")
        return bits_of(self._float(text)) if bits == 32 else int(text)

    def _float(self, operand: str) -> float:
        text = operand.replace(".reuse", "")
        if text.startswith("-"):
            return -self._float(text[1:])
        if text.startswith("|"):
            return abs(self._float(text.strip("|")))
        if re.fullmatch(r"[+]?(QNAN|SNAN)", text):
            return math.nan
        if re.fullmatch(r"[+]?INF", text):
            return math.inf
        if re.fullmatch(r"[+]?\d+(\.\d*)?(e[-+]?\d+)?", text):
            return float(text)
        return f32(self._value(text))

    def _set(self, name: str, value: int, bits: int = 32) -> None:
        name = name.replace(".reuse", "")
        if name in ("RZ", "URZ"):
            return
        self.registers[name] = value & WORD
        if bits > 32:
            found = re.fullmatch(r"(U?R)(\d+)", name)
            if found is None:
                raise UnknownInstructionError(f"register {name}")
            for word in range(1, bits // 32):
                self.registers[f"{found[1]}{int(found[2]) + word}"] = value >> 32 * word & WORD

    def _set_float(self, name: str, value: float) -> None:
        self._set(name, bits_of(value))

    def _address(self, inside: str) -> int:
        """The sum inside the brackets of a memory operand."""
        total = 0
        for part in inside.replace("+-", "+~").split("+"):
            sign, part = (-1, part[1:]) if part.startswith("~") else (1, part)
            wide = part.endswith(".64")
            value = self._value(part, 64 if wide else 32)
            if found := re.search(r"\.X(\d+)$", part):
                value *= int(found[1])
            if not wide and part.startswith("R"):
                value = as_signed(value)
            total += sign * value
        return total & LONG

    def _memory_operand(self, instruction: Instruction) -> int:
        """The address; of a copy to shared memory, which has two, that in global memory."""
        text = [operand for operand in instruction.operands if operand.endswith("]") and "[" in operand][-1]
        found = re.search(r"\[([^\[\]]*)\]$", text)
        if found is None:
            raise UnknownInstructionError(f"address {text}")
        return self._address(found[1])

    def _split(self, operands: tuple[str, ...]) -> tuple[list[str], list[str]]:
        """Predicates and the other operands, in order."""
        predicates = [each for each in operands if re.fullmatch(r"!?U?P[T0-9]+", each)]
        return predicates, [each for each in operands if each not in predicates]

    # ---- memory ------------------------------------------------------------------------------------------------------

    def _ldg(self, i: Instruction) -> None:
        size = next((BYTES[m] for m in i.modifiers if m in BYTES), 4)
        address = self._memory_operand(i)
        self.count.read += size
        self.count.trace.append((address, size))
        data = bytearray(ctypes.string_at(address, size))
        for n in range(size):
            data[n] = self.stored.get(address + n, data[n])
        value = int.from_bytes(data, "little")
        if any(m in ("S8", "S16") for m in i.modifiers):
            value = as_signed(value, 8 * size) & WORD
        self._set(i.operands[0], value, max(32, 8 * size))

    def _stg(self, i: Instruction) -> None:
        size = next((BYTES[m] for m in i.modifiers if m in BYTES), 4)
        address, value = self._memory_operand(i), self._wide_value(i.operands[-1], size)
        self.count.written += size
        self.count.trace.append((address, size))
        for n in range(size):
            self.stored[address + n] = value >> 8 * n & 0xFF

    def _ld(self, i: Instruction) -> None:  # of shared memory or of global memory, which begins far above it
        (self._ldg if self._memory_operand(i) > WORD else self._lds)(i)

    def _st(self, i: Instruction) -> None:
        (self._stg if self._memory_operand(i) > WORD else self._sts)(i)

    def _lds(self, i: Instruction) -> None:
        size = next((BYTES[m] for m in i.modifiers if m in BYTES), 4)
        address = self._memory_operand(i)
        self.count.shared += size
        data = bytes(self.shared.get(address + n, ONES[(address + n) % 2]) for n in range(size))
        self._set(i.operands[0], int.from_bytes(data, "little"), max(32, 8 * size))

    def _sts(self, i: Instruction) -> None:
        size = next((BYTES[m] for m in i.modifiers if m in BYTES), 4)
        address, value = self._memory_operand(i), self._wide_value(i.operands[-1], size)
        self.count.shared += size
        for n in range(size):
            self.shared[address + n] = value >> 8 * n & 0xFF

    def _ldl(self, i: Instruction) -> None:
        size = next((BYTES[m] for m in i.modifiers if m in BYTES), 4)
        address = self._memory_operand(i)
        data = bytes(self.local.get(address + n, 0) for n in range(size))
        self._set(i.operands[0], int.from_bytes(data, "little"), max(32, 8 * size))

    def _stl(self, i: Instruction) -> None:
        size = next((BYTES[m] for m in i.modifiers if m in BYTES), 4)
        address, value = self._memory_operand(i), self._wide_value(i.operands[-1], size)
        for n in range(size):
            self.local[address + n] = value >> 8 * n & 0xFF

    def _ldgsts(self, i: Instruction) -> None:
        self.count.read += 16
        self.count.shared += 16
        self.count.trace.append((self._memory_operand(i), 16))

    def _wide_value(self, name: str, size: int) -> int:
        name = name.replace(".reuse", "")
        if name == "RZ" or size <= 4:
            return self._value(name)
        number = int(name[1:])
        return sum(self._value(f"R{number + word}") << 32 * word for word in range(size // 4))
