"""What the entry does for a request: prompt, path, attempts, answer."""
