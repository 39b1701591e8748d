"""Draws tokens from logits, under grammars."""
