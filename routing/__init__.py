"""Routing: score, policies, paths, placement and admission, as pure functions of the view."""
