"""Out-of-bounds accesses and races are found, and correct kernels pass."""

import numpy as np
import pytest
import torch

from gpu_on_cpu import interpreter
from gpu_on_cpu.races import Conflict, RaceDetector
from gpu_on_cpu.sanitizer import OutOfBounds, Race, checked

from . import example_kernels as kernels

interpreter.install()


def test_a_mask_that_is_off_by_one_is_out_of_bounds():
    x, o = torch.randn(100), torch.empty(100)
    kernels.tail[(2,)](x, o, 100, 0, 64)
    assert torch.equal(o, x)
    message = (
        r"tail, program \(1, 0, 0\), load: 1 of 37 active .* p_x, by up to 4 bytes past its end"
    )
    with pytest.raises(OutOfBounds, match=message):
        kernels.tail[(2,)](x, o, 100, 1, 64)


def test_an_access_before_the_start_is_out_of_bounds():
    with pytest.raises(OutOfBounds, match="p_x, by up to 32 bytes before its start"):
        kernels.into_neighbour[(1,)](torch.randn(64), torch.empty(64), -8, 64)


def test_an_access_to_another_argument_is_out_of_bounds():
    both = torch.randn(128)
    with pytest.raises(OutOfBounds, match="p_x, by up to 256 bytes past its end"):
        kernels.into_neighbour[(1,)](both[:64], both[64:], 64, 64)


def test_a_view_may_be_used_up_to_its_last_element_and_no_further():
    x = torch.randn(64, 2)[:, 0]
    kernels.into_neighbour[(1,)](x, torch.empty(64), 63, 64)
    with pytest.raises(OutOfBounds, match="p_x, by up to 4 bytes"):
        kernels.into_neighbour[(1,)](x, torch.empty(64), 64, 64)


def test_nothing_may_be_read_from_an_empty_tensor():
    with pytest.raises(OutOfBounds, match="p_x"):
        kernels.into_neighbour[(1,)](torch.empty(0), torch.empty(64), 0, 64)


def test_a_store_without_its_mask_is_a_race():
    x, o = torch.randn(5 * 48 + 16), torch.empty(5 * 48 + 16)
    with checked(races=True):
        kernels.rows[(5,)](x, o, True, 48, 64)
        message = r"program \(1, 0, 0\), store of p_o at byte 192: stores there by program \(0"
        with pytest.raises(Race, match=message):
            kernels.rows[(5,)](x, o, False, 48, 64)
    assert torch.equal(o[: 2 * 48], x[: 2 * 48])


def sum_rows(sem):
    x, o = torch.randn(6, 32), torch.empty(32)
    part, count = torch.empty(6, 32), torch.zeros(1, dtype=torch.int32)
    kernels.last_to_arrive[(6,)](x, part, count, o, 6, sem, 32)
    torch.testing.assert_close(o, 2 * x.sum(0))
    assert count.item() == 0


@pytest.mark.parametrize("order", [None, 0, 1, 2])
def test_the_last_program_to_arrive_may_read_what_all_have_released(order):
    with checked(races=True, order=order):
        sum_rows("acq_rel")


@pytest.mark.parametrize("sem", ["relaxed", "acquire", "release"])
def test_arriving_takes_both_acquire_and_release(sem):
    with checked(races=True), pytest.raises(Race, match=r"load of p_part .* stores there"):
        sum_rows(sem)


def test_a_store_after_the_release_is_not_released():
    part, count = torch.empty(6, 32), torch.zeros(1, dtype=torch.int32)
    with checked(races=True), pytest.raises(Race, match="load of p_part"):
        kernels.late_store[(6,)](part, count, torch.empty(32), 6, 32)


@pytest.mark.parametrize("order", [None, 5])
def test_the_last_program_to_arrive_may_overwrite_what_all_have_read(order):
    x, o, count = torch.zeros(32), torch.empty(6, 32), torch.zeros(1, dtype=torch.int32)
    with checked(races=True, order=order):
        kernels.read_then_overwrite[(6,)](x, count, o, 6, True, 32)
    assert (x == 1).all()


def test_overwriting_what_others_read_is_a_race():
    x, o, count = torch.zeros(32), torch.empty(6, 32), torch.zeros(1, dtype=torch.int32)
    with checked(races=True), pytest.raises(Race, match="store of p_x at byte 0: loads there"):
        kernels.read_then_overwrite[(6,)](x, count, o, 6, False, 32)


def test_a_plain_store_beside_atomics_is_a_race():
    with checked(races=True), pytest.raises(Race, match="atomic of p_count"):
        kernels.zero_and_count[(2,)](torch.zeros(1, dtype=torch.int32))


def test_a_plain_load_beside_atomics_is_a_race():
    with checked(races=True), pytest.raises(Race, match=r"of p_count .*: atomics there"):
        kernels.count_and_look[(2,)](torch.zeros(1, dtype=torch.int32), torch.empty(2))


def test_arguments_that_overlap_share_races():
    x = torch.zeros(5 * 48)
    with checked(races=True), pytest.raises(Race, match=r"store of p_x at .* and p_o at .*: loads"):
        kernels.rows[(4,)](x[48:], x[:-48], True, 48, 64)


def test_memory_within_and_behind_an_argument_inside_another_is_followed():
    detector = RaceDetector([(0, 400, 4), (100, 200, 2)], programs=2)
    detector.start(0)
    assert detector.store(np.array([150, 300], np.uint64), 4) is None
    detector.start(1)
    assert detector.load(np.array([148, 154, 304], np.uint64), 2) is None
    assert detector.load(np.array([152], np.uint64), 2) == Conflict(152, 0, "stores")
    assert detector.load(np.array([300], np.uint64), 4) == Conflict(300, 0, "stores")


def test_arguments_that_share_memory_share_races():
    x = torch.zeros(4 * 48 + 16)
    with checked(races=True):
        kernels.rows[(4,)](x, x, True, 48, 64)  # in place, each program its own
        with pytest.raises(Race, match=r"p_x at byte \d+ and p_o at byte"):
            kernels.rows[(4,)](x, x, False, 48, 64)


def test_a_kernel_that_needs_an_order_fails_in_another():
    o = torch.zeros(16)
    kernels.relay[(16,)](o)
    assert torch.equal(o, torch.arange(1.0, 17))
    o.zero_()
    with checked(order=0):
        kernels.relay[(16,)](o)
    assert not torch.equal(o, torch.arange(1.0, 17))
    with checked(races=True), pytest.raises(Race, match="load of p_o"):
        kernels.relay[(16,)](o)


def test_checks_end_with_their_block():
    with checked(races=True):
        pass
    kernels.relay[(16,)](torch.zeros(16))
