"""Benchmarks against other implementations and the floors of the machine. Run from the root of the repository."""
