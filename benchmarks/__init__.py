"""Benchmarks: each side in its own process, warm, measured in alternating rounds; medians and the ratio's spread."""
