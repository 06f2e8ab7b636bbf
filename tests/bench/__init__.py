"""Benchmarks: programs to run by hand or through `make bench`, not timed tests."""
