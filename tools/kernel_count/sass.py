"""Executes the disassembly (SASS) of one thread of a kernel, to count the instructions that it issues.

`Program` parses nvdisasm's output for one kernel; `Thread` runs it with a kernel's real arguments and memory. Integer,
predicate and float32 arithmetic are exact enough to follow the control flow, including loops over data such as segment
ends. Shared memory that only other threads of the warp fill reads as ones. An instruction that is not known raises
`UnknownInstructionError`, so a new compiler can't silently change a count.
"""

from __future__ import annotations

import ctypes
import math
import re
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

WORD = 0xFFFFFFFF
LONG = 0xFFFFFFFFFFFFFFFF
ONES = b"\x80\x3f"  # 1.0 in bfloat16; four bytes are 1.0019 in float32

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[T0-9]+)\s+)?([A-Z0-9_.]+)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_x_\d+|\$\S+):")
_LABEL_OPERAND = re.compile(r"`\((.+?)\)")


class UnknownInstructionError(Exception):
    """The executor has no rule for an instruction or an operand."""


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.address:04x} {'.'.join((self.opcode, *self.modifiers))} {', '.join(self.operands)}"


class Program:
    """The instructions of one kernel, from the lines of nvdisasm's output for its section."""

    def __init__(self, lines: list[str]) -> None:
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        for line in lines:
            if label := _LABEL.match(line):
                self.labels[label[1]] = len(self.instructions)
            elif found := _INSTRUCTION.match(line):
                opcode, *modifiers = found[3].split(".")
                operands = tuple(part.strip() for part in found[4].split(",")) if found[4] else ()
                self.instructions.append(
                    Instruction(int(found[1], 16), found[2] or "", opcode, tuple(modifiers), operands)
                )
        self.at_address = {each.address: index for index, each in enumerate(self.instructions)}


def programs(disassembly: str) -> dict[str, Program]:
    """Mangled kernel name -> program, from `nvdisasm -c`."""
    found: dict[str, Program] = {}
    name, lines = "", []
    for line in [*disassembly.splitlines(), "//--- end ---"]:
        if line.startswith("//---"):
            if name:
                found[name] = Program(lines)
            section = re.match(r"//-+ \.text\.(\S+)\s+-+", line)
            name, lines = (section[1] if section else ""), []
        else:
            lines.append(line)
    return found


def _f32(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits & WORD))[0]


def _bits(x: float) -> int:
    try:
        return struct.unpack("<I", struct.pack("<f", x))[0]
    except OverflowError:
        return 0x7F800000 if x > 0 else 0xFF800000


def _signed(x: int, bits: int = 32) -> int:
    return x - (1 << bits) if x >> (bits - 1) & 1 else x


_COMPARISONS: dict[str, Callable] = {
    "LT": lambda a, b: a < b, "LE": lambda a, b: a <= b, "GT": lambda a, b: a > b, "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b and a == a and b == b,
    "LTU": lambda a, b: not a >= b, "LEU": lambda a, b: not a > b, "GTU": lambda a, b: not a <= b,
    "GEU": lambda a, b: not a < b, "EQU": lambda a, b: not (a < b or a > b), "NEU": lambda a, b: a != b,
    "NAN": lambda a, b: a != a or b != b, "NUM": lambda a, b: a == a and b == b,
}  # fmt: skip
_COMBINATIONS: dict[str, Callable] = {
    "AND": lambda a, b: a and b, "OR": lambda a, b: a or b, "XOR": lambda a, b: a != b,
}  # fmt: skip
_NO_OPERATION = {
    "NOP", "BSSY", "BSYNC", "WARPSYNC", "YIELD", "DEPBAR", "LDGDEPBAR", "CCTL", "MEMBAR", "ERRBAR", "FENCE", "ARRIVES",
}  # fmt: skip
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@dataclass
class Count:
    """What one thread did.

    issued: instructions, predicated-off ones included, since these take an issue slot too
    by_opcode: the same per opcode
    read, written: bytes of global memory, of all instructions; shared: bytes read or written in shared memory
    trace: address and bytes of each access to global memory, in order
    """

    issued: int = 0
    by_opcode: Counter = field(default_factory=Counter)
    read: int = 0
    written: int = 0
    shared: int = 0
    trace: list[tuple[int, int]] = field(default_factory=list)

    def from_dram(self, cache: float) -> int:
        """Bytes of global memory that miss a cache of ``cache`` bytes, replaced in order of last use."""
        held: OrderedDict[int, int] = OrderedDict()
        missed = used = 0
        for address, size in self.trace:
            if address in held:
                held.move_to_end(address)
                continue
            missed += size
            used += size
            held[address] = size
            while used > cache:
                used -= held.popitem(last=False)[1]
        return missed


@dataclass(frozen=True)
class Launch:
    """One thread of a launch. shared: bytes of a block; elements: positions times the thread's features."""

    kernel: str
    threads: int
    shared: int
    registers: int
    stack: int
    elements: int
    count: Count

    @property
    def per_element(self) -> float:
        """Instructions issued by a thread, per element of [B, T, k] that it processes."""
        return self.count.issued / self.elements

    @property
    def warps(self) -> int:
        """Warps that are resident on one multiprocessor of sm_90: 65,536 registers, 227 KiB of shared memory."""
        per_block = self.threads // 32
        of_registers = 65536 // (32 * (-(-self.registers // 8) * 8)) // per_block
        of_shared = (227 << 10) // (self.shared + 1024)
        return per_block * min(of_registers, of_shared, 32, 64 // per_block)


class Thread:
    """One thread of a kernel.

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

    def run(self) -> Count:
        """Execute from the entry to EXIT."""
        instructions, at = self.program.instructions, 0
        while True:
            instruction = instructions[at]
            self.count.issued += 1
            self.count.by_opcode[instruction.opcode] += 1
            if self.count.issued > self.limit:
                raise RuntimeError(f"more than {self.limit} instructions; does the kernel end?")
            at += 1
            if instruction.guard and not self._predicate(instruction.guard):
                continue
            if instruction.opcode == "EXIT":
                return self.count
            try:
                target = self._execute(instruction)
            except (UnknownInstructionError, KeyError, IndexError, ValueError) as error:
                raise UnknownInstructionError(f"{instruction}: {error!r}") from error
            if target is not None:
                at = target

    # ---- operands ----------------------------------------------------------------------------------------------------

    def _predicate(self, name: str) -> bool:
        if name.startswith("!"):
            return not self._predicate(name[1:])
        return True if name in ("PT", "UPT") else self.predicates.get(name, False)

    def _set_predicate(self, name: str, value: bool) -> None:
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
        return _bits(self._float(text)) if bits == 32 else int(text)

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
        return _f32(self._value(text))

    def _set(self, name: str, value: int, bits: int = 32) -> None:
        name = name.replace(".reuse", "")
        if name in ("RZ", "URZ"):
            return
        self.registers[name] = value & WORD
        if bits > 32:
            kind, number = re.fullmatch(r"(U?R)(\d+)", name).groups()
            for word in range(1, bits // 32):
                self.registers[f"{kind}{int(number) + word}"] = value >> 32 * word & WORD

    def _set_float(self, name: str, value: float) -> None:
        self._set(name, _bits(value))

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
                value = _signed(value)
            total += sign * value
        return total & LONG

    def _memory_operand(self, instruction: Instruction) -> int:
        """The address; of a copy to shared memory, which has two, that in global memory."""
        text = [operand for operand in instruction.operands if operand.endswith("]") and "[" in operand][-1]
        return self._address(re.search(r"\[([^\[\]]*)\]$", text)[1])

    def _split(self, operands: tuple[str, ...]) -> tuple[list[str], list[str]]:
        """Predicates and the other operands, in order."""
        predicates = [each for each in operands if re.fullmatch(r"!?U?P[T0-9]+", each)]
        return predicates, [each for each in operands if each not in predicates]

    # ---- instructions ------------------------------------------------------------------------------------------------

    def _execute(self, i: Instruction) -> int | None:
        """The index of the next instruction if it is not the one that follows."""
        opcode = i.opcode
        if opcode in _NO_OPERATION:
            return None
        if opcode in ("BRA", "CALL", "RET", "JMP"):
            return self._jump(i)
        uniform = {"UMOV", "UIADD3", "ULEA", "USHF", "UISETP", "ULOP3", "UIMAD", "USEL", "UPLOP3", "UPRMT", "UFLO"}
        name = opcode[1:] if opcode in uniform else opcode
        method = getattr(self, f"_{name.lower()}", None)
        if method is None:
            raise UnknownInstructionError("no rule")
        method(i)
        return None

    def _jump(self, i: Instruction) -> int | None:
        predicates, rest = self._split(i.operands)
        if predicates and not all(self._predicate(each) for each in predicates):
            return None
        if i.opcode == "RET":
            return self.program.at_address[self._value(rest[0])]
        if i.modifiers[:1] == ("DIV",) or i.modifiers[:1] == ("CONV",):
            return None  # divergence of a warp; a single thread follows its own path
        return self.program.labels[_LABEL_OPERAND.search(rest[-1])[1]]

    def _mov(self, i: Instruction) -> None:
        self._set(i.operands[0], self._value(i.operands[1]))

    def _cs2r(self, i: Instruction) -> None:
        self._set(i.operands[0], self.special.get(i.operands[1], 0), 32 if "32" in i.modifiers else 64)

    def _s2r(self, i: Instruction) -> None:
        self._set(i.operands[0], self.special[i.operands[1]])

    _s2ur = _s2r

    def _r2ur(self, i: Instruction) -> None:
        _, (to, *_, source) = self._split(i.operands)
        self._set(to, self._value(source))

    def _b2r(self, i: Instruction) -> None:
        predicates, _ = self._split(i.operands)
        for each in predicates:
            self._set_predicate(each, self.barrier_result)

    def _bar(self, i: Instruction) -> None:
        predicates, _ = self._split(i.operands)
        if predicates:
            self.barrier_result = self._predicate(predicates[-1])

    def _ldc(self, i: Instruction) -> None:
        size = next((_BYTES[m] for m in i.modifiers if m in _BYTES), 4)
        bank = re.search(r"c\[0x([03])\]\[(.+)\]", i.operands[1])
        if bank is None:
            raise UnknownInstructionError("constant bank")
        # Bank 3 has the tables in the source: data, which no branch depends on.
        value = self._constant(self._address(bank[2]), size) if bank[1] == "0" else 0
        self._set(i.operands[0], value, max(32, 8 * size))

    _uldc = _ldc

    def _iadd3(self, i: Instruction) -> None:
        predicates, (to, *terms) = self._split(i.operands)
        carries = 0
        outputs = predicates
        if "X" in i.modifiers:
            first = next((n for n, each in enumerate(i.operands[1:], 1) if each == terms[0]), 1)
            outputs = [each for each in i.operands[1:first] if each in predicates]
            inputs = predicates[len(outputs) :]
            carries = sum(self._predicate(each) for each in inputs)
        total = carries
        for term in terms:
            if term.startswith("-") and not term.startswith("-0x"):
                total += (self._value(term[1:]) ^ WORD) + 1
            else:
                total += self._value(term)
        self._set(to, total)
        for rank, each in enumerate(outputs, 1):
            self._set_predicate(each, total >> 32 >= rank)

    def _viadd(self, i: Instruction) -> None:
        self._set(i.operands[0], self._value(i.operands[1]) + self._value(i.operands[2]))

    def _imad(self, i: Instruction) -> None:
        predicates, rest = self._split(i.operands)
        to, a, b, c = rest
        signed = "U32" not in i.modifiers
        wide, high = "WIDE" in i.modifiers, "HI" in i.modifiers
        x, y = self._value(a), self._value(b)
        if (wide or high) and signed:
            x, y = _signed(x), _signed(y)
        product = x * y + self._value(c, 64 if wide or high else 32)
        outputs = predicates
        if "X" in i.modifiers:
            product += self._predicate(predicates[-1])
            outputs = predicates[:-1]
        if high:
            self._set(to, product >> 32)
        else:
            self._set(to, product, 64 if wide else 32)
        for each in outputs:
            self._set_predicate(each, product >> (64 if wide else 32) != 0)

    def _lea(self, i: Instruction) -> None:
        predicates, (to, *rest) = self._split(i.operands)
        extended = "X" in i.modifiers
        outputs = predicates[:-1] if extended else predicates
        carry = self._predicate(predicates[-1]) if extended else 0
        if "HI" in i.modifiers:
            if "SX32" in i.modifiers:
                a, b, n = rest
                value = _signed(self._value(a)) & LONG
            else:
                a, b, c, n = rest
                value = self._value(a) | self._value(c) << 32
            shifted = (value << (self._value(n) & 31)) >> 32 & WORD
        else:
            a, b, n = rest
            shifted = self._value(a) << (self._value(n) & 31) & WORD
        total = shifted + self._value(b) + carry
        self._set(to, total)
        for each in outputs:
            self._set_predicate(each, total > WORD)

    def _shf(self, i: Instruction) -> None:
        to, low, amount, high = i.operands
        signed = any(m in ("S32", "S64") for m in i.modifiers)
        wide = any(m in ("U64", "S64") for m in i.modifiers)
        n = self._value(amount) & (63 if wide else WORD)
        n = min(n, 64)
        both = self._value(low) | self._value(high) << 32
        if "L" in i.modifiers:
            if "HI" in i.modifiers:
                result = both << n >> 32
            else:
                result = self._value(low) << n
        elif "HI" in i.modifiers and not wide:
            top = _signed(self._value(high)) if signed else self._value(high)
            result = (top << 32 | self._value(low)) >> min(n, 32) >> 32
        else:
            value = _signed(both, 64) if signed else both
            result = value >> n if "HI" not in i.modifiers else value >> n >> 32
        self._set(to, result)

    def _sgxt(self, i: Instruction) -> None:
        to, a, b = i.operands
        width = self._value(b)
        value = self._value(a) & ((1 << width) - 1)
        self._set(to, value if "U32" in i.modifiers else _signed(value, width) & WORD)

    def _lop3(self, i: Instruction) -> None:
        predicates, (to, a, b, c, table) = self._split(i.operands)
        x, y, z, lut = self._value(a), self._value(b), self._value(c), int(table, 16)
        result = 0
        for case in range(8):
            if lut >> case & 1:
                result |= (x if case & 4 else ~x) & (y if case & 2 else ~y) & (z if case & 1 else ~z)
        self._set(to, result & WORD)
        for each in predicates[:-1]:
            self._set_predicate(each, result & WORD != 0)

    def _plop3(self, i: Instruction) -> None:
        first, second, a, b, c, *tables = i.operands
        case = 4 * self._predicate(a) + 2 * self._predicate(b) + self._predicate(c)
        for each, table in zip((first, second), tables, strict=True):
            self._set_predicate(each, int(table, 16) >> case & 1)

    def _isetp(self, i: Instruction) -> None:
        predicates, (a, b) = self._split(i.operands)
        signed = "U32" not in i.modifiers
        x, y = self._value(a), self._value(b)
        if signed:
            x, y = _signed(x), _signed(y)
        compare = i.modifiers[0]
        result = _COMPARISONS[compare](x, y)
        if "EX" in i.modifiers:
            lower = self._predicate(predicates.pop())
            if compare == "NE":
                result = x != y or lower
            else:
                result = (x == y and lower) or (compare != "EQ" and _COMPARISONS[compare[0] + "T"](x, y))
        self._combine(i, predicates, result)

    def _combine(self, i: Instruction, predicates: list[str], result: bool) -> None:
        first, second, other = predicates
        combine = next(_COMBINATIONS[m] for m in i.modifiers if m in _COMBINATIONS)
        self._set_predicate(first, combine(result, self._predicate(other)))
        self._set_predicate(second, combine(not result, self._predicate(other)))

    def _fsetp(self, i: Instruction) -> None:
        predicates, (a, b) = self._split(i.operands)
        self._combine(i, predicates, _COMPARISONS[i.modifiers[0]](self._float(a), self._float(b)))

    def _sel(self, i: Instruction) -> None:
        to, a, b, predicate = i.operands
        self._set(to, self._value(a if self._predicate(predicate) else b))

    def _fsel(self, i: Instruction) -> None:
        to, a, b, predicate = i.operands
        chosen = a if self._predicate(predicate) else b
        self._set_float(to, self._float(chosen)) if "RZ" not in chosen else self._set(to, 0)

    def _iabs(self, i: Instruction) -> None:
        self._set(i.operands[0], abs(_signed(self._value(i.operands[1]))))

    def _vimnmx(self, i: Instruction) -> None:
        to, a, b, predicate = i.operands
        self._min_max(i, to, self._value(a), self._value(b), predicate)

    _imnmx = _vimnmx

    def _viaddmnmx(self, i: Instruction) -> None:
        to, a, b, c, predicate = i.operands
        self._min_max(i, to, self._value(a) + self._value(b) & WORD, self._value(c), predicate)

    def _min_max(self, i: Instruction, to: str, x: int, y: int, predicate: str) -> None:
        if "U32" not in i.modifiers:
            x, y = _signed(x), _signed(y)
        result = min(x, y) if self._predicate(predicate) else max(x, y)
        self._set(to, max(result, 0) if "RELU" in i.modifiers else result)

    def _p2r(self, i: Instruction, prefix: str = "P") -> None:  # other bits than the mask's come from a register
        to, _, others, mask = i.operands
        byte = next((n for n in range(4) if f"B{n}" in i.modifiers), 0)
        chosen = self._value(mask) << 8 * byte
        value = sum(self._predicate(f"{prefix}{n}") << n for n in range(7)) << 8 * byte
        self._set(to, value & chosen | self._value(others) & ~chosen)

    def _r2p(self, i: Instruction, prefix: str = "P") -> None:
        _, source, mask = i.operands
        for n in range(7):
            if self._value(mask) >> n & 1:
                self._set_predicate(f"{prefix}{n}", self._value(source) >> n & 1)

    def _up2ur(self, i: Instruction) -> None:
        self._p2r(i, "UP")

    def _ur2up(self, i: Instruction) -> None:
        self._r2p(i, "UP")

    def _popc(self, i: Instruction) -> None:
        self._set(i.operands[0], self._value(i.operands[1]).bit_count())

    def _prmt(self, i: Instruction) -> None:
        to, a, selector, b = i.operands
        both = self._value(a) | self._value(b) << 32
        out = 0
        for n in range(4):
            choice = self._value(selector) >> 4 * n & 0xF
            byte = both >> 8 * (choice & 7) & 0xFF
            if choice & 8:
                byte = 0xFF if byte & 0x80 else 0
            out |= byte << 8 * n
        self._set(to, out)

    def _shfl(self, i: Instruction) -> None:  # as if all lanes were alike
        predicates, (to, source, *_) = self._split(i.operands)
        self._set(to, self._value(source))
        for each in predicates:
            self._set_predicate(each, True)

    def _vote(self, i: Instruction) -> None:
        predicates, rest = self._split(i.operands)
        value = self._predicate(predicates[-1])
        for each in rest:
            self._set(each, WORD * value)
        for each in predicates[:-1]:
            self._set_predicate(each, value)

    _voteu = _vote

    def _redux(self, i: Instruction) -> None:
        self._set(i.operands[0], self._value(i.operands[1]))

    # ---- floats ------------------------------------------------------------------------------------------------------

    def _fadd(self, i: Instruction) -> None:
        to, a, b = i.operands
        self._set_float(to, self._float(a) + self._float(b))

    def _fmul(self, i: Instruction) -> None:
        to, a, b = i.operands
        self._set_float(to, self._float(a) * self._float(b))

    def _ffma(self, i: Instruction) -> None:
        to, a, b, c = i.operands
        self._set_float(to, self._float(a) * self._float(b) + self._float(c))

    def _fmnmx(self, i: Instruction) -> None:
        to, a, b, predicate = i.operands
        choose = min if self._predicate(predicate) else max
        self._set_float(to, choose(self._float(a), self._float(b)))

    def _mufu(self, i: Instruction) -> None:
        x = self._float(i.operands[1])
        function = {
            "RCP": lambda x: math.inf if x == 0 else 1 / x, "EX2": lambda x: 2.0 ** min(max(x, -149.0), 127.0),
            "SQRT": lambda x: math.sqrt(abs(x)), "RSQ": lambda x: 1 / math.sqrt(abs(x) or 1.0),
            "LG2": lambda x: math.log2(abs(x) or 1.0),
        }  # fmt: skip
        self._set_float(i.operands[0], function[i.modifiers[0]](x))

    def _i2f(self, i: Instruction) -> None:
        value = self._value(i.operands[1])
        self._set_float(i.operands[0], value if "U32" in i.modifiers else _signed(value))

    _i2fp = _i2f

    def _f2i(self, i: Instruction) -> None:
        value = self._float(i.operands[1])
        self._set(i.operands[0], int(value) if math.isfinite(value) else 0)

    def _frnd(self, i: Instruction) -> None:
        self._set_float(i.operands[0], float(round(self._float(i.operands[1]))))

    def _f2f(self, i: Instruction) -> None:
        value = self._float(i.operands[1])
        if i.modifiers[:2] == ("BF16", "F32"):
            self._set(i.operands[0], _bits(value) + 0x8000 >> 16 & 0xFFFF)
        elif i.modifiers[:2] == ("F16", "F32"):
            self._set(i.operands[0], _half_bits(value))
        else:
            raise UnknownInstructionError("conversion")

    def _f2fp(self, i: Instruction) -> None:  # two floats to two bfloat16 or halves; the high half comes first
        to, high, low = i.operands[:3]
        if "BF16" in i.modifiers:
            packed = [_bits(self._float(each)) + 0x8000 >> 16 & 0xFFFF for each in (high, low)]
        else:
            packed = [_half_bits(self._float(each)) for each in (high, low)]
        self._set(to, packed[0] << 16 | packed[1])

    def _hadd2(self, i: Instruction) -> None:
        if "F32" not in i.modifiers:
            raise UnknownInstructionError("half arithmetic")
        source = i.operands[2]
        bits = self._value(source)
        self._set_float(i.operands[0], _half(bits >> 16 if "H1" in source else bits & 0xFFFF))

    def _hsetp2(self, i: Instruction) -> None:
        predicates, sides = self._split(i.operands)
        first, second, other = predicates
        widen = (lambda bits: _f32(bits << 16)) if "BF16_V2" in i.modifiers else _half
        compare = next(_COMPARISONS[m] for m in i.modifiers if m in _COMPARISONS)
        values = []
        for side in sides:
            bits = self._value(side)
            low, high = (0xFFFF & bits, bits >> 16)
            if ".H0" in side:
                high = low
            elif ".H1" in side:
                low = high
            values.append((widen(low), widen(high)))
        results = [compare(a, b) for a, b in zip(*values, strict=True)]
        combine = next(_COMBINATIONS[m] for m in i.modifiers if m in _COMBINATIONS)
        self._set_predicate(first, combine(results[0], self._predicate(other)))
        self._set_predicate(second, combine(results[1], self._predicate(other)))

    def _hfma2(self, i: Instruction) -> None:  # as compilers use it, to load two constants
        to, a, b, high, low = i.operands
        if self._value(a) & 0x7FFFFFFF or self._value(b) & 0x7FFFFFFF:
            raise UnknownInstructionError("half arithmetic")
        self._set(to, _half_bits(self._float(high)) << 16 | _half_bits(self._float(low)))

    # ---- memory ------------------------------------------------------------------------------------------------------

    def _ldg(self, i: Instruction) -> None:
        size = next((_BYTES[m] for m in i.modifiers if m in _BYTES), 4)
        address = self._memory_operand(i)
        self.count.read += size
        self.count.trace.append((address, size))
        data = bytearray(ctypes.string_at(address, size))
        for n in range(size):
            data[n] = self.stored.get(address + n, data[n])
        value = int.from_bytes(data, "little")
        if any(m in ("S8", "S16") for m in i.modifiers):
            value = _signed(value, 8 * size) & WORD
        self._set(i.operands[0], value, max(32, 8 * size))

    def _stg(self, i: Instruction) -> None:
        size = next((_BYTES[m] for m in i.modifiers if m in _BYTES), 4)
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
        size = next((_BYTES[m] for m in i.modifiers if m in _BYTES), 4)
        address = self._memory_operand(i)
        self.count.shared += size
        data = bytes(self.shared.get(address + n, ONES[(address + n) % 2]) for n in range(size))
        self._set(i.operands[0], int.from_bytes(data, "little"), max(32, 8 * size))

    def _sts(self, i: Instruction) -> None:
        size = next((_BYTES[m] for m in i.modifiers if m in _BYTES), 4)
        address, value = self._memory_operand(i), self._wide_value(i.operands[-1], size)
        self.count.shared += size
        for n in range(size):
            self.shared[address + n] = value >> 8 * n & 0xFF

    def _ldl(self, i: Instruction) -> None:
        size = next((_BYTES[m] for m in i.modifiers if m in _BYTES), 4)
        address = self._memory_operand(i)
        data = bytes(self.local.get(address + n, 0) for n in range(size))
        self._set(i.operands[0], int.from_bytes(data, "little"), max(32, 8 * size))

    def _stl(self, i: Instruction) -> None:
        size = next((_BYTES[m] for m in i.modifiers if m in _BYTES), 4)
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


def _half(bits: int) -> float:
    return struct.unpack("<e", struct.pack("<H", bits & 0xFFFF))[0]


def _half_bits(x: float) -> int:
    try:
        return struct.unpack("<H", struct.pack("<e", x))[0]
    except OverflowError:
        return 0x7C00 if x > 0 else 0xFC00
