"""Kernel sources that are compiled at run time."""
