"""Model directories on disk: which files, which headers, how much memory they need."""
