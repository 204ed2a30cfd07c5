"""Dual protocol, which every op shares: `dual_op.py` tells how primal and tangent become one call."""
