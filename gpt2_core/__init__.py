"""What both frameworks share: configuration, text, batches, schedule, weights on disk. No jax, no torch."""
