"""Comparing any two models: the mapping of their weights, the first divergence, hints, and the mutation score."""
