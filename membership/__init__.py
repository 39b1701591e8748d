"""Membership: which nodes are alive, and what each publishes about itself."""
