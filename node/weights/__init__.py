"""A model's files between nodes: who has what, which piece to ask of whom next, what has come."""
