"""Chooses the kernel of a span by measurements, and checks its bits."""
