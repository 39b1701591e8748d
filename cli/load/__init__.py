"""`mesh load`: many clients at once, measured as vLLM's serving benchmark does, with every lost token counted."""
