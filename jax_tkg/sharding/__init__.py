"""Attention on a mesh: which axes split what, each device's problem, the merge of its parts."""

from jax_tkg.sharding.spec import AttentionSharding

__all__ = ["AttentionSharding"]
