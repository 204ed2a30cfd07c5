"""Ops in plain PyTorch on any device: same signatures as `fastdistill.kernels`, called below autograd."""
