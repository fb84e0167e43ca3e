"""tools/kernel_count: the executor of machine code, the budgets and the model of times."""

import ctypes

import pytest
from budgets import budget
from roofline import DEVICES, times
from sass import Count, Launch, Program, UnknownInstructionError, programs
from thread import Thread


def assembly(*lines):
    """Instructions at consecutive addresses; a line that ends in a colon is a label."""
    out, address = [], 0
    for line in lines:
        if line.endswith(":"):
            out.append(line)
        else:
            out.append(f"        /*{address:04x}*/                   {line} ;")
            address += 16
    return out


def executed(*lines, constants=b""):
    thread = Thread(Program(assembly(*lines, "EXIT")), {0x210: constants, 0: bytes(4)})
    return thread.run(), thread


def test_a_loop_is_followed_and_each_issued_instruction_counts():
    count, thread = executed(
        "MOV R0, RZ",
        ".L_x_1:",
        "IADD3 R0, R0, 0x1, RZ",
        "ISETP.GE.AND P0, PT, R0, c[0x0][0x210], PT",
        "@!P0 BRA `(.L_x_1)",
        constants=(7).to_bytes(4, "little"),
    )
    assert count.issued == 1 + 7 * 3 + 1
    assert count.by_opcode["IADD3"] == 7
    assert thread.registers["R0"] == 7


def test_predicates_go_to_a_byte_of_a_register_and_back():
    _, thread = executed(
        "MOV R5, 0x11220144",
        "ISETP.EQ.AND P1, PT, RZ, RZ, PT",
        "P2R.B1 R5, PR, R5, 0x2",
        "ISETP.NE.AND P1, PT, RZ, RZ, PT",
        "R2P PR, R5.B1, 0x2",
        "@P1 MOV R3, 0x5",
    )
    assert thread.registers["R5"] == 0x11220344
    assert thread.registers["R3"] == 5


def test_instructions_that_are_predicated_off_take_an_issue_slot_and_do_nothing():
    count, thread = executed("ISETP.NE.AND P1, PT, RZ, RZ, PT", "@P1 MOV R3, 0x5")
    assert count.issued == 3
    assert "R3" not in thread.registers


@pytest.mark.parametrize("address", [0x7FFF12345678, 0xFFFFFFF8])
def test_64_bit_addresses_carry(address):
    low, high = address & 0xFFFFFFFF, address >> 32
    _, thread = executed(
        "ULDC.64 UR4, c[0x0][0x210]",
        "IADD3 R4, P0, R4, UR4, RZ",
        "IADD3.X R5, RZ, UR5, RZ, P0, !PT",
        "IADD3 R6, P1, R4, 0x10, RZ",
        "IMAD.X R7, RZ, RZ, R5, P1",
        "LEA R8, P2, R6, RZ, 0x1",
        "LEA.HI.X R9, R6, RZ, R7, 0x1, P2",
        constants=low.to_bytes(4, "little") + high.to_bytes(4, "little"),
    )
    value = {n: thread.registers[f"R{n}"] | thread.registers[f"R{n + 1}"] << 32 for n in (4, 6, 8)}
    assert value == {4: address, 6: address + 16, 8: 2 * (address + 16)}


def test_the_division_that_compilers_make_of_a_reciprocal():
    _, thread = executed(
        "MOV R2, 0x3039",
        "MOV R9, 0x24",
        "I2F.U32.RP R0, R9",
        "MUFU.RCP R0, R0",
        "VIADD R4, R0, 0xffffffe",
        "F2I.FTZ.U32.TRUNC.NTZ R5, R4",
        "IMAD.MOV.U32 R4, RZ, RZ, RZ",
        "IADD3 R3, RZ, -R5, RZ",
        "IMAD R3, R3, R9, RZ",
        "IMAD.HI.U32 R5, R5, R3, R4",
        "IMAD.HI.U32 R6, R5, R2, RZ",
    )
    assert thread.registers["R6"] in (12345 // 36, 12345 // 36 - 1)  # the compiler corrects it by one


def test_loads_read_memory_and_dram_is_counted_once_while_the_cache_holds_it():
    values = (ctypes.c_float * 4)(1.5, 2.0, 0.25, 8.0)
    address = ctypes.addressof(values)
    lines = ["ULDC.64 UR4, c[0x0][0x210]", "MOV R4, UR4", "MOV R5, UR5"]
    lines += [f"LDG.E R{8 + n}, desc[UR10][R4.64+{hex(4 * (n % 4))}]" for n in range(8)]
    count, thread = executed(*lines, "FADD R0, R8, R9", constants=address.to_bytes(8, "little"))
    assert thread._float("R0") == 3.5
    assert count.read == 32
    assert count.from_dram(cache=16) == 16
    assert count.from_dram(cache=12) == 32


def test_a_copy_to_shared_memory_counts_by_its_source():
    lines = ["ULDC.64 UR4, c[0x0][0x210]", "MOV R4, UR4", "MOV R5, UR5", "MOV R6, RZ"]
    copies = [f"LDGSTS.E.BYPASS.128 [R6], desc[UR10][R4.64+{hex(16 * n)}]" for n in range(4)]  # a ring of one row
    count, _ = executed(*lines, *copies, constants=(1 << 40).to_bytes(8, "little"))
    assert count.from_dram(cache=1024) == count.read == count.shared == 64


def test_an_instruction_without_a_rule_is_an_error():
    with pytest.raises(UnknownInstructionError, match="HMMA"):
        executed("HMMA.16816.F32 R0, R0, R0, R0")
    with pytest.raises(UnknownInstructionError, match="constant bank"):
        executed("MOV R0, c[0x4][0x10]")


def test_a_loop_without_an_end_is_an_error():
    program = Program(assembly(".L_x_0:", "NOP", "BRA `(.L_x_0)", "EXIT"))
    with pytest.raises(RuntimeError, match="does the kernel end"):
        Thread(program, {0: bytes(4)}, limit=100).run()


def test_the_disassembly_is_split_into_kernels():
    text = "\n".join(
        ["//---- .text.first ----", *assembly("EXIT"), "//---- .text.second ----", *assembly("NOP", "EXIT")]
    )
    assert {name: len(each.instructions) for name, each in programs(text).items()} == {"first": 1, "second": 2}


def launch(**changes):
    count = Count(issued=2560, read=256, written=256)
    count.trace = [(64 * n, 4) for n in range(128)]
    values = {"threads": 32, "shared": 16 << 10, "registers": 126, "stack": 0, "elements": 256, "count": count}
    return Launch("kernel", **(values | changes))


def test_resident_warps_are_limited_by_registers_and_by_shared_memory():
    assert launch().warps == 13  # of 17 KiB each
    assert launch(shared=0).warps == 16  # of 128 registers each
    assert launch(shared=0, registers=32).warps == 32  # blocks of one warp
    assert launch(shared=0, registers=32, threads=128).warps == 64


def test_times_of_the_model():
    h100 = DEVICES[0]
    found = times(launch(), 128, h100)
    warps = 2048 * 2304 / 64
    assert found["issue"] == pytest.approx(warps * 2560 / 4 / 132 / 1.7e9 * 1e6)
    assert found["memory"] == pytest.approx(2048 * 2304 / 2 * 512 / (0.92 * 3.35e12) * 1e6)


def test_budgets_of_segments_and_lengths():
    base = budget("cuda", "forward", "one run", 128)
    assert budget("cuda", "forward", "3 runs", 128) > base
    assert budget("cuda", "forward", "one run", 512) > base
    assert budget("cuda", "another", "one run", 128) is None
