"""Secrets: the mesh's keys, the seal of datagrams and each node's signing key."""
