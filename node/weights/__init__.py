"""A model's files: their manifest, and their transfer between nodes."""
