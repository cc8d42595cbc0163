"""Comparing any two models: the mapping of their weights, where they part, hints, and the mutation score."""
