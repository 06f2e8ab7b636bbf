"""Tests the kernels on this machine and chooses one backend."""
