"""The engine: torch lives here and nowhere else in the node."""
