"""What an operator asks and does: status, diagnosis, key rotation, traces."""
