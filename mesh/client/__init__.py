"""The client of a mesh: the same calls blocking and under trio, on a core without I/O."""
