"""The compiler accepts what the interpreter ran, and needs no more than the committed budget."""

import itertools

import pytest

pytest.importorskip("triton")
from helpers import kernel_budget, launches


@pytest.fixture(scope="module")
def builds():
    return launches.build_all(kernel_budget.CI)


def test_the_triton_kernels_keep_their_budget(builds):
    assert kernel_budget.violations(kernel_budget.CI, builds) == []


def test_every_kernel_of_every_operator_was_built(builds):
    names = {build.job.kernel for build in builds if build.job.target == "sm_90"}
    assert names == {
        "attention_forward", "attention_step", "backward_keys", "backward_queries", "compare",
        "entropy_keys", "entropy_queries", "feature_map_forward", "feature_map_gradients",
    }  # fmt: skip


def test_every_shape_has_a_launch_configuration():
    from lolcats_ops.kernels.triton import launch

    for rows in launch.TABLE.values():
        for sizes in itertools.product((16, 32, 64, 128, 256), repeat=2):
            assert any(row.fits(*sizes) for row in rows)
        assert all(set(row.others) <= set(launch.ARCHITECTURES) for row in rows)


def test_the_table_is_that_of_the_architecture_that_triton_compiles_for(builds):
    warps = {
        build.job.target: build.job.num_warps
        for build in builds
        if build.job.kernel == "backward_keys" and " hybrid " in build.job.id
    }
    assert warps == {"sm_80": 8, "sm_90": 8, "sm_100": 8, "gfx942": 4}


def test_hybrid_attention_spills_no_registers_but_backward_on_sm_80(builds):
    """Of bf16 and D = f = 64. docs/gpu.md has what is live there."""

    def spills(build):  # scalar registers of AMD spill to lanes of vector registers, not to memory
        return build.resources.get("vgpr_spills", build.spills)

    hybrid = [build for build in builds if " hybrid " in build.job.id]
    spilling = {(build.job.target, build.job.kernel) for build in hybrid if spills(build)}
    assert spilling <= {("sm_80", "backward_queries"), ("sm_80", "backward_keys")}
