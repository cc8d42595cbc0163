"""Evaluation with either framework, and as a model of EleutherAI's lm-evaluation-harness."""
