"""``python -m lolcats_ops --cmakedir``: where the C library, its header and CMake files are."""

import argparse

from . import __version__, get_cmake_dir, get_include, get_library

parser = argparse.ArgumentParser(prog="python -m lolcats_ops", description=__doc__)
what = parser.add_mutually_exclusive_group(required=True)
what.add_argument("--version", dest="value", action="store_const", const=lambda: __version__)
what.add_argument("--cmakedir", dest="value", action="store_const", const=get_cmake_dir)
what.add_argument("--include", dest="value", action="store_const", const=get_include)
what.add_argument("--library", dest="value", action="store_const", const=get_library)
print(parser.parse_args().value())
