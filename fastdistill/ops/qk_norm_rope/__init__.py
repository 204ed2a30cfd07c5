"""Norm of queries and keys by head, and their rotary embedding."""
