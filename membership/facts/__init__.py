"""What each node publishes about itself beyond a datagram, and how nodes agree on it. No I/O."""
