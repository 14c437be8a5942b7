"""From executions of PTX to those of machine code."""

import pytest

from gpu_on_cpu.executed import executed_opcodes

PTX = """
.file 1 "/src/kernel.cuh"
.file 2 "/src/caller.cu"
.visible .entry kernel(
.loc 2 10 3
mov.u32 %r1, %tid.x;
$L__loop:
.loc 1 5 7, function_name $L__info_string0, inlined_at 2 20 1
add.s32 %r2, %r1, 1;
// begin inline asm
@%p1 mul.lo.s32 %r3, %r2, %r2;
.loc 1 5 7, function_name $L__info_string0, inlined_at 2 30 1
add.s32 %r4, %r3, 1;
}
"""
EXECUTED = [("mov.u32", 1), ("add.s32", 4), ("mul.lo.s32", 2), ("add.s32", 10)]
SASS = """
        //## File "/src/caller.cu", line 10
        /*0000*/                   S2R R1, SR_TID.X ;
        //## File "/src/kernel.cuh", line 5 inlined at "/src/caller.cu", line 20
        //## File "/src/caller.cu", line 20
        /*0010*/              @!P1 IMAD R3, R2, R2, RZ ;
        /*0020*/                   IADD3 R2, R1, 0x1, RZ ;
        //## File "/src/kernel.cuh", line 5 inlined at "/src/caller.cu", line 30
        /*0030*/                   IADD3 R4, R3, 0x1, RZ ;
        //## File "/src/kernel.cuh", line 99
        /*0040*/                   EXIT ;
"""


def test_machine_instructions_are_executed_as_often_as_their_line_in_ptx():
    assert executed_opcodes(PTX, SASS, EXECUTED) == {"S2R": 1, "IMAD": 3, "IADD3": 3 + 10}


def test_what_does_not_belong_together_is_refused():
    with pytest.raises(ValueError, match="not those of the PTX"):
        executed_opcodes(PTX, SASS, EXECUTED[1:])
    with pytest.raises(ValueError, match="no line in common: compile with -lineinfo"):
        executed_opcodes(PTX.replace(".loc", "//"), SASS, EXECUTED)
