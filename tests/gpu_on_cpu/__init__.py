"""Runs and checks GPU kernels on machines that have no GPU."""
