"""The sinusoidal embedding of a time."""
