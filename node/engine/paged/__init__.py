"""A stage on another device than the CPU: paged keys and values, attention over block tables, recorded decode steps."""
