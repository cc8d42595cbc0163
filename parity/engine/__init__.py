"""Comparing two programs that should compute the same: what every comparison needs, and nothing of any one model."""
