"""Fused Triton kernels of the update rules. Needs torch and Triton only."""
