"""Vectors of length one."""
