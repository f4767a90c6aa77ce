"""Triton kernels and their launchers, one op a file; a bottom layer that cannot see ``mamlfast``.

Import a module of it only where its kernels are about to run: this imports Triton. ``attention_spec`` alone does not.
"""
