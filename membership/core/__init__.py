"""The membership state machine: SWIM with signed claims, without I/O, clock or chance."""
