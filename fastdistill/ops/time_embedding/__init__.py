"""Sinusoidal embedding of a time."""
