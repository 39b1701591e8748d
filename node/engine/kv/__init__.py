"""Keys and values: blocks, the prefix cache and what is spilled."""
