"""Authenticated connections between nodes, and the calls that travel over them."""
