"""The I/O of membership: sockets, clock and peer calls around the core."""
