"""Probabilistic programs, and the distributions and kernels they need."""
