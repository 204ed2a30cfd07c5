"""Attention for padded batches and packed sequences, and the merging of its parts."""
