"""Thresholds for linear layers: how sparse each is to be, and the graph that makes it so."""
