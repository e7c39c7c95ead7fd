"""Fused operators for NAF blocks and for bank retrieval, as functions and as drop-in modules."""

__version__ = "0.1.0"
