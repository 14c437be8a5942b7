"""Builds C++ that launches kernels into a program and runs it on tensors, or into a library."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
_CHECKOUT = HERE.parents[2]

# Optimised lightly, so that what a sanitizer reports has the line it is on. A GPU's memory has no
# types, hence no assumptions from them.
_KERNEL_FLAGS = ["-std=c++17", "-O1", "-g", "-fPIC"]
_KERNEL_FLAGS += ["-fno-strict-aliasing", "-fno-omit-frame-pointer"]
_SANITIZER_FLAGS: Mapping[str | None, list[str]] = {
    None: [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
_RUNTIME_FLAGS = ["-std=c++20", "-O2", "-fPIC"]  # never instrumented
_RUNTIME_LOCK = threading.Lock()  # whoever builds several programs at once needs it once
_SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # the process ends with its tensors
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:report_thread_leaks=0:atexit_sleep_ms=0",
}
_LIBC = ctypes.CDLL(None)

# The line that says what is wrong, of the emulator and of each sanitizer.
_HEADLINE = re.compile(
    r"^.*(?:emulator: |runtime error: |SUMMARY: (?:Address|Thread)Sanitizer: ).*$", re.MULTILINE
)

_PLACE = re.compile(r"(?<=\s)(/[^\s:]+:\d+)")  # a file and a line, not of the sanitizer itself


class KernelError(RuntimeError):
    """What the emulator or a sanitizer found; ``report`` has all they said."""

    def __init__(self, report: str, status: int):
        super().__init__(_summary(report) or f"exit status {status}: {report[-2000:]}")
        self.report = report


def _summary(report: str) -> str:
    """What is wrong, and the lines of the kernel where it is: of a race, both."""
    headline = _HEADLINE.search(report)
    if not headline:
        return ""
    _, *stacks = re.split(r"^ +#0 ", report, flags=re.MULTILINE)
    accesses = stacks[: 2 if "data race" in headline[0] else 1]
    summary = headline[0]
    for stack in accesses:
        of_kernel = (p for p in _PLACE.findall(stack) if not p.startswith(f"{HERE / 'include'}/"))
        place = next(of_kernel, None)
        if place and place not in summary:
            summary += f", at {place}"
    return summary


@dataclass(frozen=True)
class Program:
    executable: Path

    def __call__(
        self,
        *,
        order: int = 0,
        timeout: float = 120,
        **arguments: torch.Tensor | float | str | None,
    ) -> None:
        """Runs it; tensors are changed in place.

        A tensor occupies memory of its own, from its first element to its last; a strided one with
        its gaps. None is a null pointer.

        order: a seed for the order of blocks, warps and lanes; 0: as they are numbered.

        Raises KernelError, and subprocess.TimeoutExpired.
        """
        with tempfile.TemporaryDirectory() as folder:
            tensors = {n: _extent(a) for n, a in arguments.items() if isinstance(a, torch.Tensor)}
            for name, extent in tensors.items():
                extent.numpy().tofile(f"{folder}/{name}")
            texts = [
                f"{name}={int(value) if isinstance(value, bool) else value}"
                for name, value in arguments.items()
                if name not in tensors and value is not None
            ]
            nulls = [f"-{name}" for name, value in arguments.items() if value is None]
            done = subprocess.run(
                [self.executable, folder, *tensors, *nulls, *texts],
                env={**os.environ, **_SANITIZER_OPTIONS, "CUDA_EMULATOR_ORDER": str(order)},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                preexec_fn=_keep_addresses,
                text=True,
                errors="replace",
                timeout=timeout,
            )
            if done.returncode:
                raise KernelError(done.stdout + done.stderr, done.returncode)
            for name, extent in tensors.items():
                path = f"{folder}/{name}"
                extent.copy_(torch.from_file(path, size=extent.numel(), dtype=torch.uint8))


def _keep_addresses() -> None:
    """The same addresses in every run. Thread sanitizers of g++ 13 and before need it where the
    system has more than 28 random bits for them; where it is forbidden nothing changes."""
    ADDR_NO_RANDOMIZE = 0x0040000
    _LIBC.personality(ADDR_NO_RANDOMIZE)


def _extent(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes from the first element to the last, as a view."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    count = last + 1 if tensor.numel() else 0
    return tensor.as_strided((count,), (1,)).view(torch.uint8)


def build(
    source: Path,
    *,
    sanitizer: str | None = None,
    include: Sequence[Path] = (),
    defines: Mapping[str, object] | None = None,
) -> Program:
    """Compiles a harness with the kernels it includes, unless that has been done.

    source: C++ that defines ``run`` of include/cuda_harness.h.
    sanitizer: None, "address" (with that of undefined behaviour) or "thread".
    """
    if sanitizer not in _SANITIZER_FLAGS:
        raise ValueError(f"sanitizer is {sanitizer!r}, needs one of {list(_SANITIZER_FLAGS)}")
    link = _SANITIZER_FLAGS[sanitizer]
    objects = [_kernels(source, link, include, defines), _runtime(), _main()]
    return Program(_linked("program", objects, link))


def build_library(
    source: Path, *, include: Sequence[Path] = (), defines: Mapping[str, object] | None = None
) -> Path:
    """A shared library instead, whose functions launch kernels on the memory of the process that
    loads it, one thread at a time. What the emulator finds ends that process.
    """
    return _linked("library", [_kernels(source, [], include, defines), _runtime()], ["-shared"])


def shared_library(source: str, name: str) -> Path:
    """C++ as a library that the loader knows by ``name``."""
    path = _cache() / f"{_key(_version(), source)}_{name}"
    _make(path, ["-shared", "-fPIC", f"-Wl,-soname,{name}", "-x", "c++", "-"], source)
    return path


def _kernels(
    source: Path,
    flags: Sequence[str],
    include: Sequence[Path],
    defines: Mapping[str, object] | None,
) -> Path:
    flags = [*_KERNEL_FLAGS, *flags, "-include", "cuda_emulator.h"]
    flags += [f"-I{folder}" for folder in (HERE / "include", *include)]
    flags += [f"-D{name}={value}" for name, value in (defines or {}).items()]
    return _compiled("kernels", [source.resolve()], flags)


def _runtime() -> Path:
    with _RUNTIME_LOCK:
        sources = sorted(p for p in (HERE / "runtime").glob("*.cpp") if p.name != "main.cpp")
        return _compiled("runtime", sources, [*_RUNTIME_FLAGS, f"-I{HERE / 'include'}"])


def _main() -> Path:
    flags = [*_RUNTIME_FLAGS, f"-I{HERE / 'include'}", f"-I{HERE / 'runtime'}"]
    return _compiled("main", [HERE / "runtime" / "main.cpp"], flags)


def _linked(name: str, objects: Sequence[Path], flags: Sequence[str]) -> Path:
    path = _cache() / f"{name}_{_key(*(path.name for path in objects), *flags)}"
    _make(path, [*flags, *map(str, objects)])
    return path


def _compiled(name: str, sources: Sequence[Path], flags: Sequence[str]) -> Path:
    """One object file of all sources, kept under what the preprocessor makes of them."""
    unit = "".join(f'#include "{path}"\n' for path in sources)
    preprocessed = _compile([*flags, "-x", "c++", "-E", "-"], unit)
    object_file = _cache() / f"{name}_{_key(_version(), *flags, preprocessed)}.o"
    _make(object_file, [*flags, "-x", "c++", "-c", "-"], unit)
    return object_file


def _make(path: Path, arguments: Sequence[str], unit: str = "") -> None:
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            _compile([*arguments, "-o", str(made)], unit)
            made.replace(path)  # at once, whoever else builds it


def _compile(arguments: Sequence[str], unit: str) -> str:
    command = [_compiler(), *arguments]
    done = subprocess.run(command, input=unit, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[:4000]}")
    return done.stdout


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


@functools.cache
def _version() -> str:
    return subprocess.run([_compiler(), "--version"], capture_output=True, text=True).stdout


def _cache() -> Path:
    folder = _CHECKOUT / "build" / "cuda_emulator"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
