"""What one node does."""
