"""`python -m bench.ports` counts what instructions occupy."""

from dataclasses import replace

import pytest
from helpers.tracing import traceable

from bench import ports


@pytest.mark.parametrize(
    ("instruction", "occupied"),
    [
        ("vfmadd231ps %zmm1,%zmm2,%zmm3", 1),
        ("vfmadd231ps (%rax),%zmm2,%zmm3", 1),
        ("vrcp14ps %zmm0,%zmm1", 3),
        ("vmovups (%rax),%zmm1", 0),
        ("vmovaps %zmm1,%zmm2", 0),
        ("vmovups %zmm1,(%rax){%k1}", 1),
        ("vmovshdup %xmm0,%xmm1", 1),
        ("vmovd %eax,%xmm1", 1),
        ("vbroadcastss (%rax),%zmm1", 0),
        ("vbroadcastss %xmm0,%zmm1", 1),
        ("vpxor %xmm1,%xmm1,%xmm1", 0),
        ("kortestw %k1,%k1", 1),
        ("add $0x40,%rax", 0),
        ("tdpbf16ps %tmm6,%tmm4,%tmm0", 0),
    ],
)
def test_vector_operations(instruction, occupied):
    name, _, operands = instruction.partition(" ")
    assert ports.vector_operations(name, operands) == occupied


def test_loads_and_stores():
    work = ports.Work()
    work.add("vfmadd231ps (%rax),%zmm2,%zmm3", 2.0)
    work.add("vmovups %zmm1,(%rax)", 1.0)
    work.add("vmovups %zmm1,(%rax){%k1}", 2.0)
    work.add("lea (%rax,%rbx,1),%rcx", 5.0)
    work.add("cmp %rax,(%rbx)", 7.0)
    work.add("data16 cs nopw 0x0(%rax,%rax,1)", 11.0)
    assert (work.loads, work.stores, work.multiply_adds) == (9.0, 3.0, 2.0)


def test_products_take_the_useful_multiply_adds_and_few_more():
    if reason := ports.why_not():
        pytest.skip(reason)
    case = replace(ports.CASES[0], T=64, D=32, V=32, f=32, window=32)
    with traceable() as (trace, program):
        work = ports.total(ports.per_token(trace, program, "avx2", case))
    useful = case.flops / case.tokens / 2 / 8
    assert useful < work.multiply_adds < 1.5 * useful
    assert work.vector < work.instructions


def test_the_set_and_the_case_have_to_exist(monkeypatch, capsys):
    for arguments in (["--isa", "scalar"], ["--case", "no_such"]):
        monkeypatch.setattr("sys.argv", ["ports", *arguments])
        with pytest.raises(SystemExit):
            ports.main()
    assert "no case matches 'no_such'" in capsys.readouterr().err
