"""What a person types; the only place that prints."""
