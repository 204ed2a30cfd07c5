"""GELU, SiLU, SwiGLU and GEGLU."""
