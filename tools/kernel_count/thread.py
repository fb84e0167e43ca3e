"""Executes the disassembly (SASS) of one thread of a kernel, to count the instructions that it issues.

`Thread` runs a program with a kernel's real arguments and memory. Integer, predicate and float32 arithmetic are exact
enough to follow the control flow, including loops over data such as segment ends. An instruction that is not known
raises `UnknownInstructionError`, so a new compiler can't silently change a count.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from sass import Count, Instruction, UnknownInstructionError
from thread_state import BYTES, LONG, WORD, ThreadState, as_signed, bits_of, bits_of_half, f32, half

_LABEL_OPERAND = re.compile(r"`\((.+?)\)")
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "LT": lambda a, b: a < b, "LE": lambda a, b: a <= b, "GT": lambda a, b: a > b, "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b and a == a and b == b,
    "LTU": lambda a, b: not a >= b, "LEU": lambda a, b: not a > b, "GTU": lambda a, b: not a <= b,
    "GEU": lambda a, b: not a < b, "EQU": lambda a, b: not (a < b or a > b), "NEU": lambda a, b: a != b,
    "NAN": lambda a, b: a != a or b != b, "NUM": lambda a, b: a == a and b == b,
}  # fmt: skip
_COMBINATIONS: dict[str, Callable[[bool, bool], bool]] = {
    "AND": lambda a, b: a and b, "OR": lambda a, b: a or b, "XOR": lambda a, b: a != b,
}  # fmt: skip
_NO_OPERATION = {
    "NOP", "BSSY", "BSYNC", "WARPSYNC", "YIELD", "DEPBAR", "LDGDEPBAR", "CCTL", "MEMBAR", "ERRBAR", "FENCE", "ARRIVES",
}  # fmt: skip


class Thread(ThreadState):
    """A thread of a kernel, with a rule for every instruction: the method of the opcode's name."""

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
        found = _LABEL_OPERAND.search(rest[-1])
        if found is None:
            raise UnknownInstructionError("target of a jump")
        return self.program.labels[found[1]]

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
        size = next((BYTES[m] for m in i.modifiers if m in BYTES), 4)
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
            x, y = as_signed(x), as_signed(y)
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
                value = as_signed(self._value(a)) & LONG
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
            top = as_signed(self._value(high)) if signed else self._value(high)
            result = (top << 32 | self._value(low)) >> min(n, 32) >> 32
        else:
            value = as_signed(both, 64) if signed else both
            result = value >> n if "HI" not in i.modifiers else value >> n >> 32
        self._set(to, result)

    def _sgxt(self, i: Instruction) -> None:
        to, a, b = i.operands
        width = self._value(b)
        value = self._value(a) & ((1 << width) - 1)
        self._set(to, value if "U32" in i.modifiers else as_signed(value, width) & WORD)

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
            x, y = as_signed(x), as_signed(y)
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
        self._set(i.operands[0], abs(as_signed(self._value(i.operands[1]))))

    def _vimnmx(self, i: Instruction) -> None:
        to, a, b, predicate = i.operands
        self._min_max(i, to, self._value(a), self._value(b), predicate)

    _imnmx = _vimnmx

    def _viaddmnmx(self, i: Instruction) -> None:
        to, a, b, c, predicate = i.operands
        self._min_max(i, to, self._value(a) + self._value(b) & WORD, self._value(c), predicate)

    def _min_max(self, i: Instruction, to: str, x: int, y: int, predicate: str) -> None:
        if "U32" not in i.modifiers:
            x, y = as_signed(x), as_signed(y)
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
        function: dict[str, Callable[[float], float]] = {
            "RCP": lambda x: math.inf if x == 0 else 1 / x, "EX2": lambda x: 2.0 ** min(max(x, -149.0), 127.0),
            "SQRT": lambda x: math.sqrt(abs(x)), "RSQ": lambda x: 1 / math.sqrt(abs(x) or 1.0),
            "LG2": lambda x: math.log2(abs(x) or 1.0),
        }  # fmt: skip
        self._set_float(i.operands[0], function[i.modifiers[0]](x))

    def _i2f(self, i: Instruction) -> None:
        value = self._value(i.operands[1])
        self._set_float(i.operands[0], value if "U32" in i.modifiers else as_signed(value))

    _i2fp = _i2f

    def _f2i(self, i: Instruction) -> None:
        value = self._float(i.operands[1])
        self._set(i.operands[0], int(value) if math.isfinite(value) else 0)

    def _frnd(self, i: Instruction) -> None:
        self._set_float(i.operands[0], float(round(self._float(i.operands[1]))))

    def _f2f(self, i: Instruction) -> None:
        value = self._float(i.operands[1])
        if i.modifiers[:2] == ("BF16", "F32"):
            self._set(i.operands[0], bits_of(value) + 0x8000 >> 16 & 0xFFFF)
        elif i.modifiers[:2] == ("F16", "F32"):
            self._set(i.operands[0], bits_of_half(value))
        else:
            raise UnknownInstructionError("conversion")

    def _f2fp(self, i: Instruction) -> None:  # two floats to two bfloat16 or halves; the high half comes first
        to, high, low = i.operands[:3]
        if "BF16" in i.modifiers:
            packed = [bits_of(self._float(each)) + 0x8000 >> 16 & 0xFFFF for each in (high, low)]
        else:
            packed = [bits_of_half(self._float(each)) for each in (high, low)]
        self._set(to, packed[0] << 16 | packed[1])

    def _hadd2(self, i: Instruction) -> None:
        if "F32" not in i.modifiers:
            raise UnknownInstructionError("half arithmetic")
        source = i.operands[2]
        bits = self._value(source)
        self._set_float(i.operands[0], half(bits >> 16 if "H1" in source else bits & 0xFFFF))

    def _hsetp2(self, i: Instruction) -> None:
        predicates, sides = self._split(i.operands)
        first, second, other = predicates
        widen = (lambda bits: f32(bits << 16)) if "BF16_V2" in i.modifiers else half
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
        self._set(to, bits_of_half(self._float(high)) << 16 | bits_of_half(self._float(low)))
