"""Whole meshes of the real membership core, in virtual time."""
