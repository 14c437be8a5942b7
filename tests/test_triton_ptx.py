"""The PTX that the compiler makes of the Triton operators, run on the CPU (gpu_on_cpu/ptx).

Right results, no race, no access out of bounds, and few bytes; ``python -m helpers.ptx_report``
tells more of the same and more cases. Kernels are interpreted in this process, so it asks others.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from filelock import FileLock
from gpu_on_cpu.ahead_of_time import CACHE

TARGETS = ("sm_80", "sm_90")
WINDOWS = ("hybrid sliding 64", "hybrid terrace 64")
CASES = (*WINDOWS, "linear 64", "transfer xent 64")


def pytest_generate_tests(metafunc):
    for name, values in (("target", TARGETS), ("case", CASES)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values)


@pytest.fixture(scope="module")
def reports(tmp_path_factory, worker_id):
    """What helpers.ptx_report says of each target: asked once, for all processes of pytest."""
    folder = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        folder = folder.parent
    files = {target: folder / f"ptx_{target}.json" for target in TARGETS}
    with FileLock(folder / "ptx.lock"):
        if not all(file.exists() for file in files.values()):
            ask(files)
    return {target: json.loads(file.read_text()) for target, file in files.items()}


def ask(files):
    """The targets' processes run side by side."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    environment |= {"PYTHONPATH": str(Path(__file__).parent), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.setdefault("TRITON_CACHE_DIR", str(CACHE))
    processes = {}
    for target, file in files.items():
        command = [sys.executable, "-m", "helpers.ptx_report", target, *CASES]
        command += ["--json", str(file)]
        processes[target] = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
    errors = {target: process.communicate()[1] for target, process in processes.items()}
    for target, process in processes.items():
        assert process.returncode == 0, errors[target][-3000:]


def test_results_are_right_and_nothing_races(reports, target, case):
    found = reports[target]["cases"][case]
    assert not found["wrong"]
    assert not found["findings"]


def bytes_of(reports, target, case, *kernels):
    """(moved, what would move if each tensor were read or written once) by these kernels."""
    launches = [x for x in reports[target]["cases"][case]["launches"] if x["kernel"] in kernels]
    assert {x["kernel"] for x in launches} == set(kernels)
    return tuple(sum(sum(x[name].values()) for x in launches) for name in ("moved", "sizes"))


@pytest.mark.parametrize("window", WINDOWS)
def test_forward_reads_and_writes_its_tensors_once(reports, target, window):
    moved, once = bytes_of(reports, target, window, "attention_forward")
    assert moved <= 1.15 * once


@pytest.mark.parametrize("window", WINDOWS)
def test_backward_reads_and_writes_its_tensors_once_per_pass(reports, target, window):
    moved, once = bytes_of(reports, target, window, "backward_queries", "backward_keys")
    assert moved <= 1.3 * once


def test_linear_attention_reads_and_writes_its_tensors_once(reports, target):
    moved, once = bytes_of(reports, target, "linear 64", "attention_forward")
    assert moved <= 1.15 * once


def test_linear_attention_backward_reads_and_writes_its_tensors_once_per_pass(reports, target):
    moved, once = bytes_of(reports, target, "linear 64", "backward_queries", "backward_keys")
    assert moved <= 1.3 * once


def test_transfer_backward_reads_and_writes_its_tensors_once_per_pass(reports, target):
    """The residual is fp32 among tiles of bf16, whose layout would load it twice."""
    moved, once = bytes_of(reports, target, "transfer xent 64", "backward_queries", "backward_keys")
    assert moved <= 1.3 * once


def bugs_of(reports, target, word):
    return {bug: found for bug, found in reports[target]["bugs"].items() if word in bug}


def test_every_deleted_barrier_is_a_race(reports, target):
    found = bugs_of(reports, target, "barrier")
    assert found
    assert all(what.startswith("race: ") for what in found.values()), found


def test_a_mask_that_is_off_by_one_shows(reports, target):
    found = bugs_of(reports, target, "mask")
    assert len(found) == 2
    assert all(found.values()), found


def test_asynchronous_work_that_nobody_waits_for_is_found(reports, target):
    """Not at every place that could wait: some only end loops that a short sequence skips."""
    found = bugs_of(reports, target, "wait")
    assert any("has not been waited for" in what for what in found.values()), found
