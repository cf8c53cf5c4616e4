"""Rotary position embeddings, and the tables of their angles."""

from ava_kernels.rotary.tables import rope_table

__all__ = ["rope_table"]
