"""Kernels compile for GPUs that are not there; what is reported of them is right and is held to."""

import json
from dataclasses import replace

import pytest

from gpu_on_cpu import budget, pipe_model
from gpu_on_cpu.ahead_of_time import BuildError, Job, build_all
from gpu_on_cpu.intermediate import digest
from gpu_on_cpu.listing import Listing
from gpu_on_cpu.occupancy import blocks_per_sm
from gpu_on_cpu.sass import read_sass

KERNELS = "gpu_on_cpu.tests.example_kernels"
MATMUL = {"p_a": "*bf16", "p_b": "*bf16", "p_o": "*bf16", "K": "i32:1024", "BT": 64, "BK": 64}
MANY = {"p_x": "*fp32", "p_o": "*fp32", "T": "i32", "N": 64}
COPY = {"p_x": "*fp32", "p_bias": "none", "p_o": "*fp32", "N": 1024}
FP32 = {"p_a": "*fp32", "p_b": "*fp32", "p_o": "*fp32", "N": 64}

JOBS = {
    "sm_80": Job(KERNELS, "matmul", MATMUL, "sm_80", num_stages=3),
    "sm_90": Job(KERNELS, "matmul", MATMUL, "sm_90", num_stages=3),
    "sm_100": Job(KERNELS, "matmul", MATMUL, "sm_100", num_stages=3),
    "gfx942": Job(KERNELS, "matmul", MATMUL, "gfx942"),
    "spills": Job(KERNELS, "many_live_values", MANY, "sm_80", num_warps=1),
    "fits": Job(KERNELS, "many_live_values", MANY, "sm_80", num_warps=8),
    "spills on gfx942": Job(KERNELS, "many_live_values", MANY | {"N": 128}, "gfx942", num_warps=1),
    "none": Job(KERNELS, "optional", COPY, "sm_80", case="none"),
    "pointer": Job(KERNELS, "optional", COPY | {"p_bias": "*fp32"}, "sm_80", case="aligned"),
    "unaligned": Job(
        KERNELS, "optional", COPY | {"p_bias": "*fp32:unaligned"}, "sm_80", case="unaligned"
    ),
    "tf32": Job(KERNELS, "product", FP32 | {"PRECISION": "=tf32"}, "sm_80", case="tf32"),
    "tf32x3": Job(KERNELS, "product", FP32 | {"PRECISION": "=tf32x3"}, "sm_80", case="tf32x3"),
    "last": Job(
        KERNELS,
        "last_to_arrive",
        {"p_x": "*fp32", "p_part": "*fp32", "p_count": "*i32", "p_o": "*fp32", "n": "i32"}
        | {"SEM": "=acq_rel", "N": 1024},
        "sm_90",
    ),
}


@pytest.fixture(scope="module")
def builds():
    return dict(zip(JOBS, build_all(list(JOBS.values()), keep_asm=True), strict=True))


@pytest.mark.parametrize(
    ("name", "matrix", "copies"),
    [
        ("sm_80", "HMMA", "LDGSTS"),
        ("sm_90", "HGMMA", "LDGSTS"),
        ("sm_100", "UTCHMMA", "LDGSTS"),
        ("gfx942", "v_mfma", "buffer_load"),
    ],
)
def test_the_hot_loop_of_a_product_is_on_matrix_cores_and_pipelined(builds, name, matrix, copies):
    assert builds[name].hot_loop[matrix] >= 4
    assert builds[name].hot_loop[copies] >= 4
    assert sum(builds[name].hot_loop.values()) < sum(builds[name].instructions.values())


def test_a_hot_loop_need_not_multiply_matrices(builds):
    assert builds["fits"].hot_loop["FFMA"] >= 3 * 64 * 64 // 256
    assert builds["none"].hot_loop == {}


def test_async_copies_need_more_than_one_stage():
    jobs = [replace(JOBS["sm_80"], num_stages=stages) for stages in (1, 2, 3)]
    builds = build_all(jobs, workers=2)
    assert [build.job for build in builds] == jobs
    assert all(not build.asm for build in builds)  # only on request
    assert ["LDGSTS" in build.instructions for build in builds] == [False, True, True]


def test_shared_memory_is_that_of_the_stages(builds):
    tile = 64 * 64 * 2
    assert builds["sm_80"].resources["shared_bytes"] == 2 * 2 * tile
    assert builds["sm_90"].resources["shared_bytes"] == 3 * 2 * tile  # wgmma reads while it loads


@pytest.mark.parametrize("name", ["spills", "spills on gfx942"])
def test_spills_are_reported(builds, name):
    assert builds[name].spills > 0
    assert builds[name].limited_by == "registers"
    assert builds["fits"].spills == builds["sm_90"].spills == builds["gfx942"].spills == 0


def test_a_wavefront_with_all_registers_has_a_simd_for_itself(builds):
    assert builds["spills on gfx942"].resources["vgprs"] == 512
    assert builds["spills on gfx942"].occupancy == 4  # blocks of one wavefront on four SIMDs


def test_an_absent_pointer_is_compiled_away(builds):
    assert builds["none"].instructions["LDG"] < builds["pointer"].instructions["LDG"]


def test_specialisation_is_that_of_a_launch(builds):
    assert "ld.global.v4" in builds["pointer"].asm["ptx"]
    aligned, unaligned = (builds[n].instructions["LDG"] for n in ("pointer", "unaligned"))
    assert unaligned > aligned


def test_the_interpreters_tf32_is_that_of_the_compiler(builds):
    assert ".tf32" in builds["tf32"].asm["ptx"]
    assert "cvt.rna.tf32" not in builds["tf32"].asm["ptx"]  # tensor cores truncate by themselves
    assert "cvt.rna.tf32" in builds["tf32x3"].asm["ptx"]


def test_all_warps_have_stored_before_one_releases(builds):
    before, _, _ = builds["last"].asm["ptx"].partition("atom.global.gpu.acq_rel")
    assert before.rindex("bar.sync") > before.rindex("st.global")


def test_the_machine_code_can_be_read(builds):
    assert "HGMMA.64x64x16.F32.BF16" in builds["sm_90"].asm["sass"]
    assert "v_mfma_f32_32x32x8_bf16" in builds["gfx942"].asm["amdgcn"]


def test_every_job_that_fails_is_named_with_its_reason():
    wrong_kind = Job(KERNELS, "matmul", MATMUL | {"K": "int"}, "sm_80")
    too_small = Job(KERNELS, "uncompilable", {"p_x": "*fp32", "N": 16}, "sm_80")
    no_3xtf32 = Job(KERNELS, "product", FP32 | {"PRECISION": "=tf32x3"}, "gfx942")
    with pytest.raises(BuildError) as failure:
        build_all([wrong_kind, too_small, no_3xtf32])
    of_first, others = str(failure.value).split("uncompilable sm_80 w4 s2: ")
    of_second, of_third = others.split("product gfx942 w4 s2: ")
    assert of_first.startswith("matmul sm_80 w4 s2: ")
    assert "unknown kind of argument 'int'" in of_first
    assert "N is too small" in of_second
    assert "must be one of ('bf16x3', 'bf16x6', 'ieee', 'tf32')" in of_third


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match="target is 'sm_70'; there are sm_75,"):
        Job(KERNELS, "matmul", MATMUL, "sm_70")


def test_the_hottest_loop_is_the_innermost_one_that_multiplies():
    sass = """
.L_outer:
        /*0000*/                   FADD R1, R1, R2 ;
.L_inner:
        /*0010*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
.L_wait:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5 ;
        /*0030*/              @!P0 BRA `(.L_wait) ;
        /*0040*/               @P1 BRA `(.L_inner) ;
        /*0050*/               @P2 BRA `(.L_outer) ;
        /*0060*/                   EXIT ;
.L_end:
        /*0070*/                   BRA `(.L_end) ;
"""
    listing = read_sass(sass)
    assert listing.loops == ((2, 3), (1, 4), (0, 5))
    assert listing.skipped == ()
    assert listing.hottest_loop()[0] == "HMMA.16816.F32.BF16"
    assert len(listing.hottest_loop()) == 4
    assert Listing(("FADD", "EXIT"), ()).hottest_loop() == ()


def test_what_a_branch_ahead_skips_is_told_apart():
    sass = """
        /*0000*/              @!P0 BRA `(.L_after) ;
        /*0010*/                   FADD R1, R1, R2 ;
        /*0020*/                   FADD R1, R1, R3 ;
.L_after:
        /*0030*/               @P1 BRA `(.L_next) ;
.L_next:
        /*0040*/                   EXIT ;
"""
    assert read_sass(sass).skipped == ((1, 2),)


@pytest.mark.parametrize(
    ("target", "registers", "shared", "threads", "expected"),
    [
        ("sm_80", 128, 0, 128, (4, "registers")),
        ("sm_80", 16, 0, 1024, (2, "threads")),
        ("sm_80", 16, 0, 32, (32, "blocks")),
        ("sm_80", 32, 81 * 1024, 128, (2, "shared_bytes")),
        ("sm_80", 32, 163 * 1024, 128, (1, "shared_bytes")),
        ("sm_80", 32, 164 * 1024, 128, (0, "shared_bytes")),
        ("sm_75", 32, 64 * 1024, 128, (1, "shared_bytes")),  # of which the system takes nothing
        ("sm_75", 32, 0, 512, (2, "threads")),
    ],
)
def test_occupancy_is_that_of_the_tables(target, registers, shared, threads, expected):
    assert blocks_per_sm(target, registers, shared, threads) == expected


PROGRAM = """#loc = loc("kernels.py":7:0)
tt.func public @f(%p_x: !tt.ptr<f32> loc("p_x"(#loc)), %n: i32 loc("kernels.py":7:0)) {
  %x = tt.splat %n : i32 -> tensor<16xi32> loc(#loc2)
}
#loc2 = loc("x"(#loc))
"""


def test_a_program_is_the_same_under_other_names_and_in_another_place():
    other = PROGRAM.replace("p_x", "p_y").replace("%n", "%count").replace(":7:", ":19:")
    assert digest(other) == digest(PROGRAM)


@pytest.mark.parametrize("change", [("16xi32", "32xi32"), ("splat %n", "splat %p_x")])
def test_another_type_or_operand_makes_another_program(change):
    assert digest(PROGRAM.replace(*change)) != digest(PROGRAM)


class TestBudget:
    @pytest.fixture
    def path(self, builds, tmp_path):
        budget.write([builds["sm_80"], builds["spills"]], tmp_path / "budget.json")
        return tmp_path / "budget.json"

    @pytest.fixture
    def violations(self, builds, path):
        """Of the two builds, after a change to the file's entry of a job."""

        def of_change(name=None, change=lambda entry: None):
            content = json.loads(path.read_text())
            if name:
                change(content["kernels"][JOBS[name].id])
            path.write_text(json.dumps(content))
            return budget.compare([builds["sm_80"], builds["spills"]], path, "make budget")

        return of_change

    def test_builds_keep_to_what_was_written_of_them(self, violations):
        assert violations() == []

    def test_spills_exceed_a_budget_without(self, violations):
        found = violations("spills", lambda entry: entry["at_most"].update(spill_loads=0))
        assert "many_live_values sm_80 w1 s2: spill_loads" in found[0]
        assert found[-1] == "if that is meant: make budget"

    def test_registers_beyond_the_budget_are_counted(self, violations):
        found = violations("sm_80", lambda entry: entry["at_most"].update(registers=40))
        assert found[0].endswith(", at most 40")

    def test_a_smaller_need_is_no_violation(self, violations):
        assert violations("sm_80", lambda entry: entry["at_most"].update(registers=255)) == []

    def test_lost_occupancy_and_instructions_are_violations(self, violations):
        found = violations("sm_80", lambda entry: entry.update(blocks_at_least=9))
        assert "4 blocks per multiprocessor (limited by shared_bytes), at least 9" in found[0]
        found = violations("sm_80", lambda entry: entry["in_hot_loop"].append("HGMMA"))
        assert any("no HGMMA in the hot loop" in violation for violation in found)

    def test_missing_and_stale_entries_are_violations(self, builds, path):
        found = budget.compare([builds["sm_80"], builds["sm_90"]], path, "make budget")
        assert found[0] == "matmul sm_90 w4 s3: missing in budget.json"
        assert found[1] == "many_live_values sm_80 w1 s2: stale in budget.json"

    def test_a_budget_of_another_triton_is_a_violation(self, builds, path):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"triton": "3.8.0"}))
        found = budget.compare([builds["sm_80"], builds["spills"]], path, "make budget")
        assert "of triton 3.8.0" in found[0]

    def test_programs_that_have_not_changed_need_no_build(self, builds, path):
        programs = {build.job.id: build.program for build in (builds["sm_80"], builds["spills"])}
        assert budget.compare_programs(programs, path, "make budget") == []
        changed, stale = programs
        found = budget.compare_programs({changed: "another", "new": "one"}, path, "make budget")
        assert found == [
            "new: missing in budget.json",
            f"{stale}: stale in budget.json",
            f"{changed}: not the program that budget.json is of",
            "if that is meant: make budget",
        ]

    def test_entries_can_be_kept_without_a_build(self, builds, path):
        before = path.read_text()
        budget.write([builds["sm_80"]], path, keep=[builds["spills"].job.id])
        assert path.read_text() == before

    def test_jobs_that_share_an_id_have_no_budget(self, builds, path):
        with pytest.raises(ValueError, match="share an id"):
            budget.write([builds["sm_80"], builds["sm_80"]], path)

    def test_kernels_that_fit_nowhere_have_no_budget(self, builds, path):
        before = path.read_text()
        with pytest.raises(ValueError, match=f"holds a block of {builds['sm_80'].job.id}"):
            budget.write([replace(builds["sm_80"], occupancy=0)], path)
        assert path.read_text() == before


class TestPipeModel:
    @pytest.mark.parametrize(("name", "flop_per_cycle"), [("sm_80", 2048), ("sm_90", 4096)])
    def test_tensor_cycles_are_those_of_the_products_flop(self, builds, name, flop_per_cycle):
        prediction = pipe_model.predict(builds[name])
        assert prediction.pipes["tensor"] == 2 * 64**3 / flop_per_cycle

    def test_a_prediction_is_an_interval_and_says_that_it_is_a_model(self, builds):
        prediction = pipe_model.predict(builds["sm_90"], bytes_per_trip=2 * 64 * 64 * 2)
        assert prediction.busiest == "memory"
        assert prediction.overlapped == pytest.approx(2 * 64 * 64 * 2 / 13.87, rel=1e-3)
        assert prediction.serialised > prediction.overlapped
        assert str(prediction).endswith("[MODEL, not measured]")

    def test_an_inner_loop_counts_as_often_as_its_matrix_instructions(self):
        opcodes = ("MOV", "HMMA.16816.F32", "MUFU.EX2", "HMMA.16816.F32", "BRA", "FADD", "BRA")
        listing = Listing(opcodes, loops=((1, 6), (2, 4)))
        executed = [("add.f32", 5), ("mma.sync.aligned", 10), ("mma.sync.aligned", 25)]
        trip, trips = pipe_model.trip(listing, executed)
        expected = {"HMMA.16816.F32": 3.5, "MUFU.EX2": 2.5, "BRA": 3.5, "FADD": 1}
        assert (trip, trips) == (expected, 10)
        with pytest.raises(ValueError, match="2 matrix instructions, executions of 1"):
            pipe_model.trip(listing, executed[:2])

    def test_what_a_branch_skips_counts_as_often_as_its_shuffles(self):
        opcodes = ("BRA", "SHFL.BFLY", "FADD", "SHFL.BFLY", "HMMA.16816.F32", "BRA")
        listing = Listing(opcodes, loops=((0, 5),), skipped=((1, 3),))
        rare = [("shfl.sync", 4), ("shfl.sync", 4)]
        trip, _ = pipe_model.trip(listing, [("mma.sync.aligned", 10), *rare])
        assert trip == {"BRA": 2, "SHFL.BFLY": 0.8, "FADD": 0.4, "HMMA.16816.F32": 1}
        unclear = [("mma.sync.aligned", 10), *rare, ("add.f32", 10), *rare]
        assert pipe_model.trip(listing, unclear)[0]["FADD"] == 1

    def test_tf32_takes_four_times_as_long_as_bf16(self, builds):
        bf16 = pipe_model._tensor_flop("HMMA.16816.F32.BF16")
        assert (
            pipe_model._tensor_flop("HMMA.1688.F32.TF32") == bf16
        )  # half the depth, half the rate

    def test_products_without_a_rate_are_refused(self, builds):
        loop = replace(builds["sm_90"], hot_loop_opcodes=("QGMMA.64x64x32.F32.E4M3.E4M3",))
        with pytest.raises(ValueError, match="no rate of QGMMA"):
            pipe_model.predict(loop)

    def test_targets_without_throughputs_are_refused(self, builds):
        with pytest.raises(ValueError, match="no throughputs of gfx942"):
            pipe_model.predict(builds["gfx942"])

    def test_kernels_without_loops_are_refused(self, builds):
        with pytest.raises(ValueError, match="has no loop"):
            pipe_model.predict(builds["none"])

    def test_conversions_and_exponentials_take_the_slow_pipe(self, builds):
        opcodes = ("MUFU.EX2", "F2F.BF16.F32", "LDS.128", "LDSM.16.M88.4", "FFMA")
        loop = replace(builds["sm_80"], hot_loop_opcodes=opcodes, threads=32)
        pipes = pipe_model.predict(loop).pipes
        assert pipes["special"] == 2 * 32 / 16
        assert pipes["l1"] == (32 * 16 + 512) / 128
        assert pipes["fma"] == 32 / 64
        assert pipes["issue"] == 5 / 4
