"""CUDA C++ kernels on a CPU: built by g++, run thread by thread, watched by its sanitizers."""

from .program import KernelError, Program, build

__all__ = ["KernelError", "Program", "build"]
