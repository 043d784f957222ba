"""Checkpoints larger than memory: weights that are read when something is computed from them, and not before."""
