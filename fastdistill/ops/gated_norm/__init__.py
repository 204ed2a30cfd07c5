"""Gated residual of one transformer block, with the norm before the next."""
