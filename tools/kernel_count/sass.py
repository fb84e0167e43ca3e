"""Programs of disassembled kernels (SASS), and what a thread of one did.

`programs` parses nvdisasm's output; `thread.Thread` executes one thread of a `Program`, and counts.
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[T0-9]+)\s+)?([A-Z0-9_.]+)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_x_\d+|\$\S+):")


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
    name = ""
    lines: list[str] = []
    for line in [*disassembly.splitlines(), "//--- end ---"]:
        if line.startswith("//---"):
            if name:
                found[name] = Program(lines)
            section = re.match(r"//-+ \.text\.(\S+)\s+-+", line)
            name, lines = (section[1] if section else ""), []
        else:
            lines.append(line)
    return found


@dataclass
class Count:
    """What one thread did.

    issued: instructions, predicated-off ones included, since these take an issue slot too
    by_opcode: the same per opcode
    read, written: bytes of global memory, of all instructions; shared: bytes read or written in shared memory
    trace: address and bytes of each access to global memory, in order
    """

    issued: int = 0
    by_opcode: Counter[str] = field(default_factory=Counter)
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
