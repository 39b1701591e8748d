"""Keys and values: their memory in blocks, the tensors, the prefix cache, and spilled pages."""
