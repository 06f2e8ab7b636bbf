"""The fused Metal and CUDA kernels, and the launches of them."""
