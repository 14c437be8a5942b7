"""``python -m lolcats_ops --cmakedir``: where the C library, its header and CMake files are."""

import argparse

from . import __version__, get_cmake_dir, get_include, get_library, get_torch_library

ANSWERS = {
    "--version": (lambda: __version__, "of the package"),
    "--cmakedir": (get_cmake_dir, "lolcats_ops_DIR, for find_package"),
    "--include": (get_include, "folder of lolcats_ops/lolcats_ops.h"),
    "--library": (get_library, "the C library"),
    "--torch-library": (get_torch_library, "what registers torch.ops.lolcats_ops, for dlopen"),
}

parser = argparse.ArgumentParser(prog="python -m lolcats_ops", description=__doc__)
what = parser.add_mutually_exclusive_group(required=True)
for flag, (answer, text) in ANSWERS.items():
    what.add_argument(flag, dest="answer", action="store_const", const=answer, help=text)
print(parser.parse_args().answer())
