"""What is built: the wheel, the source distribution and a plain CMake installation."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import nvrtc

REPOSITORY = Path(__file__).parents[1]
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
# One instruction set, barely optimised: the packaging is under test.
QUICK = {"LOLCATS_ISAS": "scalar", "CMAKE_BUILD_TYPE": "Debug"}


def run(*command, **environment):
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env={**os.environ, "PATH": TOOLS, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """A wheel built where torch cannot be imported."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "torch.py").write_text("raise ImportError('the build must not need torch')")
    run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"),
        *(f"--config-settings=cmake.define.{name}={value}" for name, value in QUICK.items()),
        *(f"--config-settings=build-dir={folder / 'build'}", "--wheel-dir", folder, REPOSITORY),
        PYTHONPATH=str(folder),
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_wheel_holds_the_library_its_header_and_nothing_outside_its_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    header = "include/lolcats_ops"
    for part in (f"{header}/lolcats_ops.h", f"{header}/SPEC.md", "cmake/lolcats_opsConfig.cmake"):
        assert f"lolcats_ops/{part}" in names
    assert "lolcats_ops/py.typed" in names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"lolcats_ops"}


def test_wheel_holds_the_sources_that_nvrtc_compiles_and_no_others(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    of_kernels = {Path(name) for name in names if name.startswith("lolcats_ops/kernels/")}
    sources = {path for path in of_kernels if path.suffix != ".py"}
    wanted = [path.name for path in (REPOSITORY / "kernels" / "cuda").glob("*.cuh")]
    for name in wanted:  # which grows by what is included
        text = (REPOSITORY / "kernels" / "cuda" / name).read_text()
        wanted += set(re.findall(r'#include "(.*)"', text)) - set(wanted)
    assert sources == {Path("lolcats_ops/kernels/cuda", name) for name in wanted}


@pytest.mark.skipif(nvrtc.library() is None, reason="nvidia-cuda-nvrtc is not installed")
@pytest.mark.parametrize(
    "kernel", ["feature_map<lol::f16, false>", "hybrid_attention_step<float, 16, 8, 4, true>"]
)
def test_sources_in_the_wheel_compile_as_the_installed_package_says(installed, kernel):
    kernel = f"lol::cuda::{kernel}"
    code = (
        f"import sys; sys.path[:0] = {import_path(installed)!r};"
        "from lolcats_ops import _cuda_sources;"
        f"print(*_cuda_sources.options(), _cuda_sources.unit({kernel!r}), sep=chr(0))"
    )
    *options, unit = run(sys.executable, "-S", "-c", code).split("\0")
    assert f"-I{installed}/lolcats_ops/kernels/cuda" in options
    assert ".target sm_90" in nvrtc.build(unit, (*options, "-arch=compute_90"), kernel).ptx


@pytest.mark.skipif(not shutil.which("ldd"), reason="needs ldd")
def test_no_binary_links_torch(installed):
    binaries = list(installed.rglob("*.so"))
    assert len(binaries) == 3
    for binary in binaries:
        assert "libtorch" not in run("ldd", binary)


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
def test_library_exports_the_c_abi_alone(installed):
    library = next(installed.rglob("liblolcats_ops.so"))
    symbols = [line.split()[-1] for line in run("nm", "-D", "--defined-only", library).splitlines()]
    assert "lol_hybrid_attention" in symbols
    assert not [symbol for symbol in symbols if not symbol.startswith("lol_")]


def import_path(installed):
    """The wheel and NumPy alone; with -S also without .pth files, so without the checkout."""
    return [str(installed), str(Path(np.__file__).parents[1])]


def test_installed_wheel_runs_without_the_checkout(installed):
    code = (
        f"import sys; sys.path[:0] = {import_path(installed)!r}; import lolcats_ops, numpy as np;"
        "features = lolcats_ops.numpy.Features(np.ones((2, 4, 4)));"
        "y = lolcats_ops.numpy.feature_map(np.ones((1, 2, 3, 4), np.float32), features);"
        "print(y.sum(-1).max(), lolcats_ops.__file__)"
    )
    value, file = run(sys.executable, "-S", "-c", code).split()
    assert float(value) == 2.0
    assert file.startswith(str(installed))


def test_source_distribution_holds_the_sources_alone(tmp_path):
    code = f"from scikit_build_core.build import build_sdist; build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", code)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"kernels/cpu/dispatch.cpp", "bindings/operators.cpp", "pyproject.toml"} <= names
    assert not [name for name in names if name.startswith(("build/", ".venv", "out/"))]


def test_c_project_finds_the_wheel_with_find_package(installed, tmp_path):
    build_and_test_c_project(tmp_path, installed / "lolcats_ops" / "cmake")


def test_find_package_says_what_it_has_no_component_of(installed, tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(user LANGUAGES C CXX)\n"
        "find_package(lolcats_ops CONFIG REQUIRED COMPONENTS torch cuda)\n"
    )
    command = ["cmake", "-S", tmp_path, "-B", tmp_path / "build"]
    command.append(f"-Dlolcats_ops_DIR={installed / 'lolcats_ops' / 'cmake'}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode
    assert "no component 'cuda', only torch" in " ".join(done.stderr.split())


def test_plain_cmake_builds_tests_and_installs(tmp_path):
    build, prefix = tmp_path / "build", tmp_path / "prefix"
    warnings = "-Wall -Wextra -Wfloat-conversion -Werror"
    strict = dict.fromkeys(("CMAKE_C_FLAGS", "CMAKE_CXX_FLAGS"), warnings)
    options = [f"-D{name}={value}" for name, value in {**QUICK, **strict}.items()]
    run("cmake", "-S", REPOSITORY, "-B", build, "-DLOLCATS_BUILD_TESTS=ON", *options)
    run("cmake", "--build", build, "--parallel", 2)
    assert "100% tests passed" in run("ctest", "--test-dir", build, "--output-on-failure")
    run("cmake", "--install", build, "--prefix", prefix)
    moved = prefix.rename(tmp_path / "moved")
    config = next(moved.rglob("lolcats_opsConfig.cmake"))
    build_and_test_c_project(tmp_path / "external", config.parent)
    if shutil.which("pkg-config"):
        path = str(next(moved.rglob("lolcats_ops.pc")).parent)
        flags = run("pkg-config", "--cflags", "--libs", "lolcats_ops", PKG_CONFIG_PATH=path)
        program = REPOSITORY / "tests" / "ctest" / "test_operators.c"
        run("cc", program, "-o", tmp_path / "program", *flags.split(), "-lm")
        run(tmp_path / "program", LD_LIBRARY_PATH=str(Path(path).parent))


def test_a_project_that_becomes_a_wheel_may_have_it_as_a_part(tmp_path):
    """scikit-build-core's SKBUILD is the project's then, and so is what its wheel holds."""
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(user LANGUAGES C CXX)\n"
        f"add_subdirectory({REPOSITORY} lolcats_ops)\n"
        "if(LOLCATS_INSTALL OR LOLCATS_BUILD_PYTHON OR NOT TARGET lolcats_ops::lolcats_ops)\n"
        "  message(FATAL_ERROR wrong)\nendif()\n"
    )
    run("cmake", "-S", tmp_path, "-B", tmp_path / "build", "-DSKBUILD=2", "-DLOLCATS_ISAS=scalar")


def test_a_part_of_a_project_installs_nothing_over_what_is_the_projects(tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(user LANGUAGES C CXX)\n"
        "include(GNUInstallDirs)\nset(LOLCATS_INSTALL ON)\n"
        f"add_subdirectory({REPOSITORY} lolcats_ops)\n"
    )
    build, prefix = tmp_path / "build", tmp_path / "prefix"
    options = ("-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", "-DCMAKE_UNITY_BUILD=ON")
    options += ("-DCMAKE_CXX_FLAGS=-ffast-math -fno-exceptions",)  # what this library does without
    run("cmake", "-S", tmp_path, "-B", build, "-DLOLCATS_ISAS=scalar", *options)
    compiled = json.loads((build / "compile_commands.json").read_text())
    command = {Path(c["file"]).name: c["command"] for c in compiled}
    kernels = [c["command"] for c in compiled if "/kernels/" in c["file"]]
    assert all(c.find("-fno-fast-math") > c.find("-ffast-math") for c in kernels)
    linked = (build / "lolcats_ops/kernels/CMakeFiles/lolcats_ops.dir/link.txt").read_text()
    assert (
        linked.find("-fno-fast-math") > linked.find("-ffast-math") > 0
    )  # or loading it would flush
    for source in ("api.cpp", "operators.cpp"):  # by its name: not a part of a unity build
        assert command[source].find(" -fexceptions") > command[source].find("-fno-exceptions")
    assert command["gemm.cpp"].rfind("-fno-exceptions") > command["gemm.cpp"].find(" -fexceptions")
    (build / "lolcats_ops/kernels/liblolcats_ops.so").touch()  # for what a build would have made
    run("cmake", "--install", build, "--component", "devel", "--prefix", prefix)
    files = [path.relative_to(prefix) for path in prefix.rglob("*") if path.is_file()]
    assert Path("share/doc/lolcats_ops/LICENSE") in files
    assert any(path.name.startswith("lolcats_opsTargets-") for path in files)  # of no build type
    assert all("lolcats_ops" in str(path) for path in files)


@pytest.mark.parametrize("absolute", ["LIBDIR", "INCLUDEDIR"])
def test_pkg_config_finds_folders_wherever_they_are(tmp_path, absolute):
    elsewhere, prefix = tmp_path / "elsewhere", tmp_path / "prefix"
    options = (f"-DCMAKE_INSTALL_PREFIX={prefix}", f"-DCMAKE_INSTALL_{absolute}={elsewhere}")
    build = tmp_path / "build"
    run("cmake", "-S", REPOSITORY, "-B", build, "-DLOLCATS_ISAS=scalar", *options)
    lines = (build / "lolcats_ops.pc").read_text().splitlines()
    found = {"LIBDIR": prefix / "lib", "INCLUDEDIR": prefix / "include", absolute: elsewhere}
    assert f"libdir={found['LIBDIR']}" in lines
    assert f"includedir={found['INCLUDEDIR']}" in lines


def test_an_instruction_set_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="there is no avx3"):
        run("cmake", "-S", REPOSITORY, "-B", tmp_path, "-DLOLCATS_ISAS=scalar;avx3")


AARCH64 = ("aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++", "qemu-aarch64")


@pytest.mark.skipif(
    not all(map(shutil.which, AARCH64)), reason="needs g++-aarch64-linux-gnu and qemu-user"
)
def test_c_library_computes_on_aarch64(tmp_path):
    """Cross-compiled, on an emulated CPU."""
    run(
        *("cmake", "-S", REPOSITORY, "-B", tmp_path, "-DLOLCATS_BUILD_TESTS=ON"),
        *("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"),
        *(f"-DCMAKE_C_COMPILER={AARCH64[0]}", f"-DCMAKE_CXX_COMPILER={AARCH64[1]}"),
        f"-DCMAKE_CROSSCOMPILING_EMULATOR={AARCH64[2]};-L;/usr/aarch64-linux-gnu",
    )
    run("cmake", "--build", tmp_path, "--parallel", "2")
    assert "100% tests passed" in run("ctest", "--test-dir", tmp_path, "--output-on-failure")


def build_and_test_c_project(build, cmake_dir):
    source = REPOSITORY / "tests" / "ctest"
    run("cmake", "-S", source, "-B", build, f"-Dlolcats_ops_DIR={cmake_dir}")
    run("cmake", "--build", build)
    assert "100% tests passed" in run("ctest", "--test-dir", build, "--output-on-failure")
