"""The machine on PTX written by hand: instructions, control flow, errors."""

import re
import struct

import numpy as np
import pytest

from gpu_on_cpu.ptx import Fault, Hazard, NotSupported, PtxError, PtxKernel

HEADER = ".version 8.0\n.target sm_80\n.address_size 64\n"
SHARED = ".extern .shared .align 16 .b8 memory[];\n"
REGISTERS = ".reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<99>; .reg .f32 %f<9>; .reg .b64 %d<9>;"
# %d1: the first argument; %r1: the thread; %d2: where in the argument the thread has its 4 bytes.
PROLOGUE = """
    ld.param.u64 %d1, [out];
    mov.u32 %r1, %tid.x;
    mad.wide.u32 %d2, %r1, 4, %d1;
"""


def kernel_of(body, threads=32, declarations=""):
    return PtxKernel(
        f"{HEADER}{SHARED}{declarations}.visible .entry test(.param .u64 out, .param .u64 other)\n"
        f".reqntid {threads}\n{{ {REGISTERS} {PROLOGUE} {body}\nret;\n}}"
    )


def run(body, out=None, threads=32, **options):
    """What each thread stores to [%d2], and the report."""
    out = np.zeros(threads, np.uint32) if out is None else out
    report = kernel_of(body, threads)((1,), [out], **options)
    return out, report


def f32(value):
    return "0f" + struct.pack(">f", value).hex()


# ---------------------------------------------------------------------------- instructions

HALVES_ABOVE_0 = "mov.b32 %r3, 0x3f80c000; setp.gt.bf16x2 %p1|%p2, %r3, 0;"  # -2 and 1

BF16_TERMS = "mov.b16 %h1, 0x3f88; mov.b16 %h2, 0x2b80;"
F16_TERMS = "mov.b16 %h1, 0x3c20; mov.b16 %h2, 0x3c10; mov.b16 %h4, 1;"

# An instruction, with its result in %r2 or %f2, and the value.
VALUES = [
    ("add.s32 %r2, 7, -9;", -2),
    ("mul.hi.u32 %r2, 0x80000000, 6;", 3),
    ("mul.hi.s32 %r2, -2, 3;", -1),
    ("mad.lo.s32 %r2, -3, 5, 1;", -14),
    ("div.s32 %r2, -7, 2;", -3),
    ("rem.s32 %r2, -7, 2;", -1),
    ("min.s32 %r2, -7, 2;", -7),
    ("min.u32 %r2, -7, 2;", 2),
    ("min.relu.s32 %r2, -7, 2;", 0),
    ("max.relu.s32 %r2, -7, -2;", 0),
    ("abs.s32 %r2, -7;", 7),
    ("shl.b32 %r2, 1, 32;", 0),
    ("shr.s32 %r2, -8, 33;", -1),
    ("shr.u32 %r2, -8, 31;", 1),
    ("bfe.u32 %r2, 0xabcd, 4, 8;", 0xBC),
    ("bfe.s32 %r2, 0xabcd, 4, 8;", 0xBC - 256),
    ("bfe.s32 %r2, 0x80000000, 40, 8;", -1),
    ("bfi.b32 %r2, 0xf, 0xaa00, 4, 4;", 0xAAF0),
    ("prmt.b32 %r2, 0x33221100, 0x77665544, 0x5140;", 0x55114400),
    ("prmt.b32 %r2, 0x33221180, 0, 0x0008;", 0x808080FF),
    ("lop3.b32 %r2, 0xf0, 0xcc, 0xaa, 0x96;", 0xF0 ^ 0xCC ^ 0xAA),
    ("shf.l.wrap.b32 %r2, 0x80000000, 1, 33;", 3),
    ("shf.r.clamp.b32 %r2, 1, 5, 40;", 5),
    ("popc.b32 %r2, 0xf1;", 5),
    ("clz.b32 %r2, 1;", 31),
    ("brev.b32 %r2, 2;", 1 << 30),
    ("selp.b32 %r2, 1, 2, %p1;", 2),
    ("setp.lt.s32 %p1, -1, 1; selp.b32 %r2, 1, 2, %p1;", 1),
    ("setp.lt.u32 %p1, -1, 1; selp.b32 %r2, 1, 2, %p1;", 2),
    ("setp.eq.s32 %p2, 1, 1; setp.ge.and.s32 %p1, 2, 1, !%p2; selp.b32 %r2, 1, 2, %p1;", 2),
    ("mov.b32 %r2, {1, 2}; mov.b32 {%h1, %h2}, %r2; mov.b32 %r2, {%h2, %h1};", 0x00010002),
    ("{ .reg .b32 %r2; mov.b32 %r2, 5; } mov.b32 %r2, 6;", 6),
    ("cvt.u32.u16 %r2, 0xffff;", 0xFFFF),
    ("mov.b16 %h1, 0x80ff; cvt.s32.s8 %r2, %h1;", -1),
    ("cvt.rzi.s32.f32 %r2, " + f32(-2.7) + ";", -2),
    ("cvt.rni.s32.f32 %r2, " + f32(2.5) + ";", 2),
    ("cvt.rzi.u32.f32 %r2, " + f32(-1.0) + ";", 0),
    ("cvt.rzi.s32.f32 %r2, " + f32(3e9) + ";", 2**31 - 1),
    ("cvt.rna.tf32.f32 %r2, 0x3f801000;", 0x3F802000),
    ("cvt.rn.bf16x2.f32 %r2, " + f32(1.0) + ", " + f32(-2.0) + ";", 0x3F80C000),
    ("mov.b32 %r2, 0x3f80c000; mul.rn.bf16x2 %r2, %r2, %r2;", 0x3F804080),
    (
        f"{HALVES_ABOVE_0} selp.b32 %r2, 1, 0, %p1; selp.b32 %r4, 2, 0, %p2; or.b32 %r2, %r2, %r4;",
        2,
    ),
    ("mov.b32 %r2, 0x3c004000; fma.rn.f16x2 %r2, %r2, %r2, %r2;", 0x40004600),
    # Rounded once: 1.0625^2 + 2^-40 in bf16, 1.03125 x 1.015625 + 2^-24 in fp16.
    (f"{BF16_TERMS} fma.rn.bf16 %h3, %h1, %h1, %h2; cvt.u32.u16 %r2, %h3;", 0x3F91),
    (f"{F16_TERMS} fma.rn.f16 %h3, %h1, %h2, %h4; cvt.u32.u16 %r2, %h3;", 0x3C31),
]
FLOATS = [
    ("fma.rn.f32 %f2, " + ", ".join([f32(1 + 2**-23)] * 2) + ", " + f32(-1) + ";", 2**-22 + 2**-46),
    ("add.ftz.f32 %f2, " + f32(1e-40) + ", 0f00000000;", 0.0),
    ("add.f32 %f2, " + f32(2**-140) + ", 0f00000000;", 2**-140),
    ("ex2.approx.f32 %f2, " + f32(-3) + ";", 0.125),
    ("ex2.approx.ftz.f32 %f2, " + f32(-130) + ";", 0.0),
    ("max.f32 %f2, 0f7fc00000, " + f32(1) + ";", 1.0),
    ("max.NaN.f32 %f2, 0f7fc00000, " + f32(1) + ";", float("nan")),
    ("min.xorsign.abs.f32 %f2, " + f32(-1) + ", " + f32(3) + ";", -1.0),
    ("div.full.f32 %f2, " + f32(1) + ", " + f32(-4) + ";", -0.25),
    ("cvt.rn.f32.s32 %f2, -3;", -3.0),
    ("cvt.rmi.f32.f32 %f2, " + f32(-0.5) + ";", -1.0),
    ("mov.b16 %h1, 0x3fc0; cvt.f32.bf16 %f2, %h1;", 1.5),
]


@pytest.mark.parametrize(("instruction", "value"), VALUES)
def test_integer_instructions(instruction, value):
    out, _ = run(f"{instruction} st.global.b32 [%d2], %r2;")
    assert out[0] == value % 2**32


@pytest.mark.parametrize(("instruction", "value"), FLOATS)
def test_float_instructions(instruction, value):
    out = np.zeros(32, np.float32)
    run(f"{instruction} st.global.f32 [%d2], %f2;", out)
    np.testing.assert_array_equal(out[0], np.float32(value))


LANE = np.arange(32)


@pytest.mark.parametrize(
    ("instruction", "value"),
    [
        ("shfl.sync.bfly.b32 %r2, %r1, 5, 31, -1;", LANE ^ 5),
        ("shfl.sync.idx.b32 %r2, %r1, 3, 0x181f, -1;", LANE // 8 * 8 + 3),
        ("shfl.sync.up.b32 %r2, %r1, 2, 0, -1;", np.where(LANE < 2, LANE, LANE - 2)),
        ("shfl.sync.down.b32 %r2, %r1, 2, 31, -1;", np.where(LANE > 29, LANE, LANE + 2)),
        ("redux.sync.add.u32 %r2, %r1, -1;", LANE * 0 + 31 * 16),
        ("setp.lt.s32 %p1, %r1, 3; vote.sync.ballot.b32 %r2, %p1, -1;", LANE * 0 + 7),
        ("mov.u32 %r2, %laneid; mov.u32 %r3, %ntid.x; add.u32 %r2, %r2, %r3;", LANE + 32),
    ],
)
def test_what_lanes_do_together(instruction, value):
    out, _ = run(f"{instruction} st.global.b32 [%d2], %r2;")
    np.testing.assert_array_equal(out, value)


def test_atomics_return_what_was_there():
    out = np.zeros(32, np.int32)
    run("atom.global.add.s32 %r2, [%d1], 2; st.global.b32 [%d2+0], %r2;", out, threads=1)
    assert out[0] == 0
    run("atom.global.cas.b32 %r2, [%d1+4], 0, 9; red.global.max.s32 [%d1+4], 7;", out, threads=1)
    assert out[1] == 9


def test_generic_addresses_reach_both_spaces():
    body = """
        mov.u64 %d3, memory; cvta.shared.u64 %d4, %d3; mad.wide.u32 %d5, %r1, 4, %d4;
        st.b32 [%d5], %r1; ld.b32 %r2, [%d5]; st.b32 [%d2], %r2;
    """
    out, report = run(body, shared_bytes=128)
    np.testing.assert_array_equal(out, LANE)
    assert report.global_bytes[0].stored == 128


def test_generic_atomics_reach_both_spaces():
    body = """
        mov.u64 %d3, memory; cvta.shared.u64 %d4, %d3; st.shared.b32 [memory], 5; bar.sync 0;
        atom.add.u32 %r2, [%d4], 2; atom.add.u32 %r3, [%d1+4], 3;
        ld.shared.b32 %r2, [memory]; st.global.b32 [%d1], %r2;
    """
    out, _ = run(body, np.zeros(2, np.uint32), threads=1, shared_bytes=4)
    assert out.tolist() == [7, 3]


def test_sectors_do_not_depend_on_where_the_host_put_an_array():
    body = "st.global.b32 [%d2], %r1;"
    memory = memoryview(bytearray(160))
    for skip in range(0, 32, 4):  # bytes
        _, report = run(body, np.frombuffer(memory[skip : skip + 128], np.uint32))
        assert report.accesses[0].sectors == 4
    view = np.zeros(40, np.uint32)[4:36]  # 16 bytes after the beginning
    assert run(body, view)[1].accesses[0].sectors == 5


@pytest.mark.parametrize(
    "instruction",
    ["add.f32 %f3, %f1;", "fma.rn.f32 %f1, %f2, %f3;", "mul.rn.bf16x2 %r1, %r2, %r3, %r4;"],
)
def test_an_instruction_with_too_few_or_many_operands_is_refused(instruction):
    with pytest.raises(PtxError, match=r"operands, .* takes"):
        kernel_of(instruction)


def test_parameters_of_all_kinds_and_one_entry_of_several():
    ptx = f"""{HEADER}
        .visible .entry nothing() {{ ret; }}
        .visible .entry sum(.param .u64 out, .param .align 4 .b8 pair[8], .param .f32 third) {{
            {REGISTERS}
            ld.param.u64 %d1, [out]; ld.param.f32 %f1, [pair+4]; ld.param.f32 %f2, [third];
            add.f32 %f1, %f1, %f2; st.global.f32 [%d1], %f1;
        }}"""
    with pytest.raises(PtxError, match="name one: nothing, sum"):
        PtxKernel(ptx)
    out = np.zeros(1, np.float32)
    PtxKernel(ptx, "sum")((1,), [out, struct.pack("ff", 1, 2), 0.5], threads=1)
    assert out[0] == 2.5


# ---------------------------------------------------------------------------- control flow


def test_lanes_part_and_meet_again():
    """Each lane counts to its own number; all of them then vote, and nobody is for another turn."""
    body = """
        mov.u32 %r2, 0;
    loop:
        add.u32 %r2, %r2, 1;
        setp.le.u32 %p1, %r2, %r1;
        @%p1 bra loop;
        vote.sync.ballot.b32 %r3, %p1, -1;
        add.u32 %r2, %r2, %r3;
        st.global.b32 [%d2], %r2;
    """
    out, report = run(body)
    np.testing.assert_array_equal(out, LANE + 1)
    assert report.instructions["st.global.b32"] == 1


def test_a_collective_that_lanes_have_left_is_an_error():
    body = "setp.lt.u32 %p1, %r1, 5; @%p1 ret; bar.sync 0;"
    with pytest.raises(Fault, match=r"lanes 5,6,.* that have exited: `bar\.sync 0`"):
        run(body)


def test_a_barrier_that_a_warp_skips_is_a_deadlock():
    body = "setp.lt.u32 %p1, %r1, 32; @%p1 ret; bar.sync 0;"
    with pytest.raises(Fault, match="deadlock at a barrier: warp 0 has exited, warp 1 waits at 0"):
        run(body, threads=64)


def test_a_loop_without_end_is_an_error():
    with pytest.raises(Fault, match="no end"):
        run("loop: bra loop;", max_instructions=1000)


# ---------------------------------------------------------------------------- shared memory

OWN_WORD = "mov.u32 %r9, memory; mad.lo.u32 %r10, %r1, 4, %r9;"
OTHER_WARPS_WORD = "xor.b32 %r11, %r10, 128; ld.shared.b32 %r2, [%r11]; st.global.b32 [%d2], %r2;"


@pytest.mark.parametrize("order", [None, 0, 1])
def test_a_barrier_orders_and_its_absence_is_a_race(order):
    for barrier in ("bar.sync 0;", ""):
        body = f"{OWN_WORD} st.shared.b32 [%r10], %r1; {barrier} {OTHER_WARPS_WORD}"
        out, report = run(body, threads=64, shared_bytes=256, order=order)
        assert bool(report.races) == (not barrier)
        if barrier:
            np.testing.assert_array_equal(out, np.arange(64) ^ 32)


def test_a_barrier_of_two_warps_orders_these_alone():
    """Warps 0 and 1 exchange words, warp 2 reads what warp 0 wrote."""
    pair = f"""{OWN_WORD} st.shared.b32 [%r10], %r1;
        setp.ge.u32 %p1, %r1, 64; @%p1 bra third; bar.sync 1, 64; {OTHER_WARPS_WORD} ret;
    third: """
    _, report = run(pair, threads=96, shared_bytes=384)
    assert not report.races
    _, report = run(pair + "ld.shared.b32 %r2, [%r9];", threads=96, shared_bytes=384)
    assert {f.hazard for f in report.races} == {Hazard.RACE}


def test_a_write_after_a_read_is_a_race():
    body = f"{OWN_WORD} {OTHER_WARPS_WORD} st.shared.b32 [%r10], %r1;"
    _, report = run(body, threads=64, shared_bytes=256)
    assert any(
        re.search("writes .*st.shared.* read it by .*ld.shared", str(r)) for r in report.races
    )


def test_an_error_names_the_race_before_it():
    outside = "setp.ge.u32 %p1, %r1, 32; @%p1 ld.global.b32 %r2, [%d8];"
    body = f"{OWN_WORD} st.shared.b32 [%r10], %r1; {OTHER_WARPS_WORD} {outside}"
    with pytest.raises(Fault, match=r"after \d hazards, first race") as error:
        run(body, threads=64, shared_bytes=256)
    assert error.value.findings[0].hazard is Hazard.RACE


def test_atomics_of_two_warps_are_no_race():
    body = "atom.shared.add.u32 %r2, [memory], 1; bar.sync 0; ld.shared.b32 %r3, [memory];"
    _, report = run(body + "st.global.b32 [%d2], %r3;", threads=64, shared_bytes=4)
    assert not report.races


@pytest.mark.parametrize(
    ("stride", "bytes", "conflict"), [(4, 4, 1), (8, 4, 2), (128, 4, 32), (132, 4, 1), (16, 16, 1)]
)
def test_bank_conflicts(stride, bytes, conflict):
    registers = {4: "%r2", 16: "{%r2, %r3, %r4, %r5}"}[bytes]
    vector = {4: "", 16: ".v4"}[bytes]
    body = f"mul.lo.u32 %r9, %r1, {stride}; ld.shared{vector}.b32 {registers}, [%r9];"
    _, report = run(body, shared_bytes=32 * 132 + 16)
    (access,) = report.accesses
    assert access.wavefronts == conflict * access.ideal_wavefronts


@pytest.mark.parametrize(
    ("access", "message"),
    [
        (
            "ld.shared.b32 %r2, [memory+128];",
            r"out of bounds: shared address 128 \+ 4 bytes of 128",
        ),
        ("ld.shared.b32 %r2, [memory+2];", "misaligned: 4 bytes at shared address 2"),
        ("ld.global.v2.b32 {%r2, %r3}, [%d1+4];", "misaligned: 8 bytes"),
        ("ld.global.b32 %r2, [%d1+-4];", "4 bytes that begin 4 bytes before argument 0"),
        ("st.global.b32 [%d1+128], %r2;", "4 bytes that end 4 bytes past the end of argument 0"),
        ("ld.global.b32 %r2, [%d8];", "out of bounds"),
    ],
)
def test_bad_addresses_are_errors(access, message):
    with pytest.raises(Fault, match=message):
        run(access, np.zeros(33, np.uint32)[:32], shared_bytes=128)


def test_uninitialised_shared_memory_is_nan():
    out = np.zeros(32, np.float32)
    run("ld.shared.f32 %f1, [memory]; st.global.f32 [%d2], %f1;", out, shared_bytes=4)
    assert np.isnan(out).all()


# ---------------------------------------------------------------------------- not supported


@pytest.mark.parametrize(
    ("instruction", "reason"),
    [
        ("mbarrier.init.shared.b64 [memory], 1;", "descriptors"),
        ("cp.async.bulk.commit_group;", "descriptors"),
        ("call.uni printf;", "device functions"),
        ("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1}, {%r2}, {%r3}, {%r4};", ""),
        ("add.sat.s32 %r2, %r1, 1;", ""),
        ("cvt.rn.satfinite.e4m3x2.f32 %h1, %f1, %f2;", ""),
        ("ld.local.b32 %r2, [%d1];", ""),
        ("mov.u64 %d3, %clock64;", ""),
        ("frobnicate.b32 %r2;", ""),
    ],
)
def test_what_is_not_supported_says_so_with_its_text(instruction, reason):
    with pytest.raises(NotSupported) as error:
        kernel_of(instruction)
    assert instruction.rstrip(";").split(";")[0] in str(error.value)
    assert reason in str(error.value)


def test_accesses_know_whether_they_lie_in_a_loop():
    body = "again: st.global.u32 [%d2], %r3; add.s32 %r3, %r3, 1; setp.lt.s32 %p1, %r3, 3;"
    _, report = run(f"mov.u32 %r3, 0; {body} @%p1 bra again; st.global.u32 [%d2], %r3;")
    assert [(access.looped, access.requests) for access in report.accesses] == [
        (True, 3),
        (False, 1),
    ]
