"""Trains, evaluates and exports the small model that answers when no `--model` is given."""
