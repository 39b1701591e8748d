"""Parts of a stage on another device than the CPU: paged keys and values, attention over block tables, recorded steps."""
