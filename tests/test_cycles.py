"""`python -m bench.cycles` has a model of a core take the instructions of a call."""

from dataclasses import replace

import pytest
from helpers.tracing import traceable

from bench import cycles, ports


@pytest.mark.parametrize(
    ("core", "instruction", "text"),
    [
        (
            "znver3",
            "vmulps 0x5213(%rip),%ymm1,%ymm2  # 5c5ea0 <_fini>",
            "vmulps 64(%rip),%ymm1,%ymm2",
        ),
        ("znver3", "jne    a4b40 <micro<0, 6>>", "nop"),
        ("znver3", "call   9c21c <micro<0, 6>>", None),
        ("znver3", "sub    $0x8,%rsp", None),
        ("znver3", "push   %r12", "movq %r12,-8(%rsp)"),
        ("znver3", "push   -0x8(%r10)", "push -0x8(%r10)"),
        ("znver3", "push   $0x0", "movq $0x0,-8(%rsp)"),
        ("znver3", "pop    %r12", "movq 8(%rsp),%r12"),
        ("znver3", "vbroadcastss 0x4(%rax),%zmm2", "vbroadcastss 0x4(%rax),%zmm2"),
        ("znver4", "vbroadcastss 0x4(%rax),%zmm2", "vmovups 0x4(%rax),%zmm2"),
        ("znver4", "vbroadcastss %xmm1,%zmm2", "vbroadcastss %xmm1,%zmm2"),
        ("znver4", "vdpbf16ps %zmm0,%zmm1,%zmm2", "vfmadd231ps %zmm0,%zmm1,%zmm2"),
    ],
)
def test_assembly(core, instruction, text):
    assert cycles.assembly(instruction, core) == text


def of(*instructions, times):
    """Addresses of the instructions one after another, times over, and what is there."""
    listing = {i: ("function", text) for i, text in enumerate(instructions)}
    return list(listing) * times, listing


def needs_a_simulator():
    if cycles.simulator() is None:
        pytest.skip(cycles.why_not())


def test_chains_wait_and_others_do_not():
    needs_a_simulator()
    alone = [f"vfmadd231ps %ymm15,%ymm14,%ymm{i}" for i in range(12)]
    shares, use = cycles.simulate(*of(*alone, times=320), "znver3")
    assert shares["function"].cycles == pytest.approx(60, rel=0.01)  # two start in a cycle
    assert shares["function"].multiply_adds == 120
    assert max(use.values()) == pytest.approx(60, rel=0.01)
    shares, _ = cycles.simulate(*of(*alone[:4], times=320), "znver3")
    assert shares["function"].cycles == pytest.approx(40, rel=0.01)  # each 4 after the one before


def test_a_core_that_does_not_exist():
    needs_a_simulator()
    with pytest.raises(RuntimeError, match=r"llvm-mca: .*no_such"):
        cycles.simulate(*of("vaddps %ymm1,%ymm2,%ymm3", times=1), "no_such")


def test_a_block_takes_what_its_multiply_adds_do_and_more():
    if reason := cycles.why_not():
        pytest.skip(reason)
    case = replace(ports.CASES[0], T=96, D=16, V=16, f=16, window=32)
    with traceable() as (trace, program):
        addresses = cycles.block(trace, program, "avx2", case)
    shares, _ = cycles.simulate(addresses, ports.disassembly("avx2"), "znver3")
    multiply_adds = sum(share.multiply_adds for share in shares.values())
    assert multiply_adds > case.flops / case.tokens / 2 / 8
    assert sum(share.cycles for share in shares.values()) > multiply_adds / 2


def test_cases_have_to_exist(monkeypatch, capsys):
    if reason := cycles.why_not():
        pytest.skip(reason)
    monkeypatch.setattr("sys.argv", ["cycles", "--case", "no_such"])
    with pytest.raises(SystemExit):
        cycles.main()
    assert "no case matches 'no_such'" in capsys.readouterr().err
