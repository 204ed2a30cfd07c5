"""Evaluation: exact solutions, and metrics that need no download."""
