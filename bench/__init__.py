"""Benchmarks of mamlfast against the other ways to the same meta-gradient; see ``README.md``."""
