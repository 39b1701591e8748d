"""Decides what each engine step computes. No torch."""
