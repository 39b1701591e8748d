"""Who shall do it: pure decisions over the view."""
