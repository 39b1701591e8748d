"""Our own CPU kernel: C sources, how they are built at first use, and how Python calls them (docs/decisions/0016)."""
