"""Layers of a checkpoint as modules that compute with packed weights."""
