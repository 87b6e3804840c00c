"""Placing the weights of a decoder on a mesh: which parameter is split over which axis.

Tensor parallelism as in Shoeybi et al., "Megatron-LM", arXiv:1909.08053, section 3: the first
matrix of a pair is split by columns and the second by rows, so that attention and MLP each need one
all-reduce of the residual stream, and no device ever needs another's weights.
"""

from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jax_tkg.flax_layers.decoder import DecoderConfig, LlamaDecoder
from jax_tkg.sharding.spec import AttentionSharding

_BY_COLUMNS = ("q", "k", "v", "gate", "up")
_BY_ROWS = ("out", "down")
_TABLES = ("embedding", "lm_head")


def shard_decoder(model: LlamaDecoder, sharding: AttentionSharding) -> LlamaDecoder:
    """The decoder with its weights on a mesh; the module that was given stays as it is.

    Over the axes that `sharding` names as heads, the projections to queries, keys and values and
    the first matrices of the MLP are split by columns, the projections back by rows, and the
    embedding by vocabulary where that divides. Over all other axes weights are replicated. Where
    there are fewer KV heads than parts, every device keeps the projections to keys and values.

        sharding = AttentionSharding(mesh, batch="data", heads="tensor", keys="sequence")
        model = shard_decoder(model, sharding)
        jax_tkg.generate(model, prompts, max_new_tokens=20, cache_options={"sharding": sharding})

    Args:
        model: the decoder.
        sharding: the same that its caches get.

    Raises:
        ValueError: if the mesh does not divide the heads or the width of the MLP.
    """
    check_decoder(model.config, sharding)
    graphdef, state = nnx.split(model)
    placed = jax.device_put(state, decoder_shardings(model, sharding))
    return nnx.merge(graphdef, placed)


def check_decoder(config: DecoderConfig, sharding: AttentionSharding) -> None:
    """Checks that a decoder can be split.

    Raises:
        ValueError: which number, over which axes, and what would do.
    """
    attention, parts = config.attention, sharding.size("heads")
    sharding.check(num_heads=attention.num_heads, num_kv_heads=attention.num_kv_heads)
    if config.mlp_dim % parts:
        raise ValueError(
            f"mlp_dim = {config.mlp_dim} does not divide into the {parts} parts of "
            f"heads={sharding.heads!r}: name other axes, or none."
        )


def decoder_shardings(model: LlamaDecoder, sharding: AttentionSharding) -> Any:
    """The sharding of each weight: a pytree as `flax.nnx.split(model)[1]`.

    For loading weights straight to where they belong, such as from a checkpoint.
    """

    def place(path: Any, weight: Any) -> NamedSharding:
        names = [str(p.key) for p in path if hasattr(p, "key")]
        spec = _spec(names[-2:], sharding, model.config.attention.num_kv_heads, weight.shape)
        return NamedSharding(sharding.mesh, spec)

    return jax.tree_util.tree_map_with_path(place, nnx.split(model)[1])


def _spec(
    names: list[str], sharding: AttentionSharding, num_kv_heads: int, shape: tuple[int, ...]
) -> PartitionSpec:
    """The split of the parameter `names[-1]`, of a module `names[0]` if there are two names."""
    module, axes = names[0], sharding.heads
    if module in _BY_COLUMNS or names[-1] == "sinks":
        is_whole = module in ("k", "v") and not sharding.splits_kv_heads(num_kv_heads)
        return PartitionSpec() if is_whole else PartitionSpec(*[None] * (len(shape) - 1), axes)
    if module in _BY_ROWS and names[-1] == "kernel":
        return PartitionSpec(axes)
    if module in _TABLES and shape[0] % sharding.size("heads") == 0:
        return PartitionSpec(axes)
    return PartitionSpec()
