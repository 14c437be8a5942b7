"""Compiles Triton kernels to PTX, for GPUs that are not there, in a process of its own.

The process of the tests may run Triton's interpreter, which replaces the compiler.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Build:
    """A kernel of triton_kernels.py; arguments as in a call, with "*bf16" for a tensor."""

    kernel: str
    arguments: Mapping[str, Any]
    arch: int = 80
    options: Mapping[str, int] = field(default_factory=dict)  # num_warps, num_stages


@dataclass(frozen=True)
class Built:
    ptx: str
    shared_bytes: int


def build_all(builds: Mapping[str, Build]) -> dict[str, Built]:
    """Compiles all of them in one process."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_DEFAULT_FP_FUSION"] = "1"  # the default, named so that Triton does not warn
    env["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps({name: asdict(build) for name, build in builds.items()}),
        env=env,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"Triton does not compile:\n{done.stderr[-4000:]}")
    return {name: Built(**built) for name, built in json.loads(done.stdout).items()}


def _compile(build: Build) -> Built:
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import MockTensor

    from . import triton_kernels

    class Driver:
        """What the JIT asks of a GPU while it compiles."""

        def get_current_target(self):
            return GPUTarget("cuda", build.arch, 32)

        def get_current_device(self):
            return ("none", build.arch)

        def get_current_stream(self, device=None):
            return 0

    dtypes = {
        "*bf16": torch.bfloat16,
        "*fp16": torch.float16,
        "*fp32": torch.float32,
        "*i8": torch.int8,
        "*i32": torch.int32,
        "*i64": torch.int64,
    }
    arguments = {
        name: MockTensor(dtypes[value]) if value in dtypes else value
        for name, value in build.arguments.items()
    }
    driver.set_active(Driver())
    kernel = getattr(triton_kernels, build.kernel)
    compiled = kernel.warmup(grid=(1,), **arguments, **build.options)
    return Built(compiled.asm["ptx"], compiled.metadata.shared)


def main() -> None:
    builds = json.load(sys.stdin)
    built = {name: asdict(_compile(Build(**build))) for name, build in builds.items()}
    json.dump(built, sys.stdout)


if __name__ == "__main__":
    main()
