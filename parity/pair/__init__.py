"""Comparing any two models: the mapping of their weights, where they part, hints, and how far to trust the comparison."""
