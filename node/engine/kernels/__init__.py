"""Chooses the kernels of a span by measuring them, and checks their bits."""
