"""Comparing two programs that should compute the same: what every comparison needs, independent of any model."""
