"""The compiler accepts what the interpreter ran, and needs no more than the committed budget."""

import itertools
import json

import pytest

pytest.importorskip("triton")
from gpu_on_cpu import budget
from gpu_on_cpu.ahead_of_time import TARGETS
from helpers import launches
from helpers.kernel_budget import BUDGET, CI, RENEW


@pytest.fixture(scope="module")
def entries():
    return json.loads(BUDGET.read_text())["kernels"]


@pytest.mark.parametrize("job", CI, ids=lambda job: f"{job[0]} {' '.join(job[1].calls)}")
def test_the_kernels_that_these_calls_launch_keep_their_budget(job):
    assert budget.compare(launches.build_all([job]), BUDGET, RENEW, partial=True) == []


def test_every_kernel_has_a_budget(entries):
    assert {name.split()[0] for name in entries if " sm_90 " in name} >= {
        "attention_forward", "attention_step", "backward_keys", "backward_queries", "compare",
        "entropy_keys", "entropy_queries", "feature_map_forward", "feature_map_gradients",
    }  # fmt: skip


def test_hybrid_attention_spills_no_registers_but_backward_on_sm_80(entries):
    """Of bf16 and D = f = 64. docs/gpu.md has what is live there."""
    # Scalar registers of AMD spill to lanes of vector registers, not to memory.
    in_memory = ("spill_loads", "spill_stores", "vgpr_spills")
    usual = tuple(f" hybrid bf16 64 {target} " for target in TARGETS)
    hybrid = {n: e["at_most"] for n, e in entries.items() if any(case in n for case in usual)}
    spilling = {n for n, e in hybrid.items() if any(e.get(resource) for resource in in_memory)}
    assert len(hybrid) == 3 * len(TARGETS)
    assert spilling <= {
        "backward_queries hybrid bf16 64 sm_80 w8 s1", "backward_keys hybrid bf16 64 sm_80 w8 s1"
    }  # fmt: skip


def test_every_shape_has_a_launch_configuration():
    from lolcats_ops.kernels.triton import launch

    for rows in launch.TABLE.values():
        for sizes in itertools.product((16, 32, 64, 128, 256), repeat=2):
            assert any(row.fits(*sizes) for row in rows)
        assert all(set(row.others) <= set(launch.ARCHITECTURES) for row in rows)
