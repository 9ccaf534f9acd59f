"""Measures this machine: what it can do at most, and how much of that the kernels take."""
