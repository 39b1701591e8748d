"""The compiled CPU kernel: its C sources, their build at first use, and their interface to Python (docs/decisions/0016)."""
