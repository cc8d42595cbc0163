"""Measurements: each side in a process of its own, both warm, taking turns, medians and the ratio's spread."""
