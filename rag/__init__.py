"""What the mesh knows: parse, chunk, embed, store, search, replicate."""
