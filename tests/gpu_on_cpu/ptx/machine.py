"""Builds and loads the machine: the C++ of ``runtime/``, once per compiler and CPU."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from ctypes import POINTER, c_char, c_char_p, c_int32, c_uint64, c_void_p
from pathlib import Path

from .assembler import Program

RUNTIME = Path(__file__).with_name("runtime")
_CHECKOUT = Path(__file__).resolve().parents[3]
# -O2 takes twice as long to build and is no faster. Contraction would round as the PTX does not.
_FLAGS = ["-std=c++20", "-O1", "-ftree-vectorize", "-march=native", "-ffp-contract=off"]
_FLAGS += ["-shared", "-fPIC"]


class Options(ctypes.Structure):
    _fields_ = [
        ("check_races", c_int32),
        ("check_blocks", c_int32),
        ("seed", c_int32),
        ("threads", c_int32 * 3),
        ("grid", c_int32 * 3),
        ("shared_bytes", c_int32),
        ("max_instructions", c_uint64),
    ]


class Range(ctypes.Structure):
    _fields_ = [
        ("begin", c_uint64),
        ("end", c_uint64),
        ("host", c_uint64),
        ("argument", c_int32),
    ]


class Counters(ctypes.Structure):
    _fields_ = [
        (name, c_uint64)
        for name in (
            *("executed", "requests", "sectors", "ideal_sectors"),
            *("wavefronts", "ideal_wavefronts"),
        )
    ]


class Traffic(ctypes.Structure):
    _fields_ = [
        (name, c_uint64)
        for name in (
            *("loaded", "stored", "atomic"),
            *("loaded_sectors", "stored_sectors", "atomic_sectors"),
        )
    ]


class Finding(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("hazard", "pc", "other_pc", "warp", "other_warp")),
        *((name, c_int32) for name in ("writes", "other_writes")),
        ("block", c_int32 * 3),
        ("other_block", c_int32),
        ("address", c_uint64),
        ("count", c_uint64),
    ]


class Result(ctypes.Structure):
    _fields_ = [
        ("findings", c_int32),
        ("max_findings", c_int32),
        ("list", POINTER(Finding)),
        ("traffic", POINTER(Traffic)),
        ("fault_pc", c_int32),
        ("fault_thread", c_int32),
        ("fault_block", c_int32 * 3),
        ("message", c_char * 512),
    ]


def cache_directory() -> Path:
    """``build/ptx`` of the checkout or, where that cannot be written, a temporary folder."""
    for folder in (_CHECKOUT / "build" / "ptx", Path(tempfile.gettempdir()) / "gpu_on_cpu_ptx"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise OSError("no folder to build in")


def _key(compiler: str, sources: list[Path]) -> str:
    """Of everything the library depends on; the macros tell compiler and CPU."""
    macros = subprocess.run(
        [compiler, "-march=native", "-E", "-dM", "-x", "c++", "/dev/null"],
        capture_output=True,
        check=True,
    ).stdout
    digest = hashlib.sha256(macros + " ".join(_FLAGS).encode())
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build() -> Path:
    """Compiles the machine, unless that has been done."""
    compiler = os.environ.get("CXX", "g++")
    sources = sorted(RUNTIME.glob("*.cpp"))
    key = _key(compiler, sources + sorted(RUNTIME.glob("*.h")))
    library = cache_directory() / f"machine_{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            # One translation unit: the headers of the C++ library take longer than the sources.
            command = [compiler, *_FLAGS, "-x", "c++", "-", "-o", str(built)]
            unit = "".join(f'#include "{path}"\n' for path in sources)
            done = subprocess.run(command, input=unit, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the machine does not compile:\n{done.stderr[:4000]}")
            built.replace(library)  # at once, whoever else builds it
    return library


@functools.cache
def load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build()))
    library.ptx_operation.restype = c_char_p
    library.ptx_launch.argtypes = [
        POINTER(Program),
        POINTER(Options),
        c_void_p,
        POINTER(Range),
        c_int32,
        POINTER(Counters),
        POINTER(Result),
    ]
    return library


@functools.cache
def operations() -> dict[str, tuple[int, int]]:
    """The operations of the machine by name: their numbers, and how many operands they take, -1 if
    that varies."""
    result: dict[str, tuple[int, int]] = {}
    while (name := load().ptx_operation(len(result))) is not None:
        result[name.decode()] = len(result), load().ptx_operands(len(result))
    return result
