"""The node as a process on its machine: identity, environment, sockets, logs."""
