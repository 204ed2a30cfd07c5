"""Say once what the kernels can take: the ops ask before they choose, without loading Triton."""

from __future__ import annotations

WIDEST_HEAD = 256  # of attention
WIDE_FLOAT32 = 130 << 10  # bytes of shared memory that the mixed backward of float32 heads wider than 128 takes
WIDEST_ROW = 8192  # channels of a norm
WIDEST_ROTATED_HEAD = 512  # of the norm and rotation of queries and keys
