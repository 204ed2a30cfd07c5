"""Evaluate networks by exact solutions, and by metrics that need no download."""
