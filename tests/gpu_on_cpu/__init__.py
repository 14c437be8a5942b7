"""Tools that check Triton kernels on a machine without a GPU; README.md says what each proves.

``interpreter`` and ``sanitizer`` run a kernel on CPU tensors, ``ahead_of_time`` compiles it for
GPUs that are not there, ``budget`` holds what comes out to numbers in a file, ``pipe_model`` turns
machine code into cycles.
"""
