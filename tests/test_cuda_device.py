"""The two versions of what the CUDA kernels use of the GPU: inline PTX, and the emulator's C++."""

import re
import subprocess
from pathlib import Path

TESTS = Path(__file__).parent
DEVICE = TESTS.parent / "kernels" / "cuda" / "device.cuh"
EMULATED = TESTS / "gpu_on_cpu" / "cuda" / "include" / "emulator" / "ptx.h"


def functions(path):
    """Name to parameters, of namespace ptx; the emulator's last one, the caller's line, apart."""
    found = {}
    text = re.sub(
        r"namespace detail \{.*?\}  // namespace detail", "", path.read_text(), flags=re.S
    )
    for name, parameters in re.findall(r"inline(?:__)? [\w*]+ (\w+)\((.*?)\) \{", text, flags=re.S):
        parameters = re.sub(r",?\s*emulator::Site site = \{\}", "", parameters)
        found[name] = " ".join(parameters.split())
    return found


def test_the_emulator_has_the_functions_of_the_device_and_no_others():
    device = functions(DEVICE)
    device.pop("shared_address")  # of inline PTX alone
    assert len(device) > 10
    assert functions(EMULATED) == device


def test_inline_ptx_is_in_one_file():
    sources = sorted(DEVICE.parent.glob("*.cuh"))
    assert [path.name for path in sources if re.search(r"\basm\b", path.read_text())] == [
        DEVICE.name
    ]


def test_launches_of_one_thread_leave_those_of_another_their_shared_memory(tmp_path):
    """The launcher that is built in, on a stand-in for the CUDA runtime."""
    root = TESTS.parent
    include = [root, root / "kernels" / "include", TESTS / "cuda" / "runtime"]
    command = ["c++", "-std=c++17", *(f"-I{path}" for path in include), "-o", tmp_path / "built_in"]
    subprocess.run([*command, "-xc++", TESTS / "cuda" / "built_in.cpp"], check=True)
    subprocess.run([tmp_path / "built_in"], check=True)
