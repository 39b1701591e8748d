"""The replicated document index: parse, chunk, embed, store, search, replicate."""
