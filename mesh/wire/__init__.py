"""The messages that nodes exchange and their encodings. No I/O."""
