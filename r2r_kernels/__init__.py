"""Fused operators for NAF blocks and for bank retrieval, as functions and as drop-in modules."""

from r2r_kernels.swap import Swaps, accelerate, decelerate

__all__ = ["Swaps", "accelerate", "decelerate"]
__version__ = "0.2.0"
