"""What an attention layer is, as a frozen value that nnx and linen modules share."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy.typing as npt

from jax_tkg.cache.kv_cache import KVCache, RingKVCache
from jax_tkg.cache.layouts import DenseLayout
from jax_tkg.cache.storage import Scale
from jax_tkg.cache.writing import Writer
from jax_tkg.implementations import Implementation
from jax_tkg.rope import RotaryEmbedding
from jax_tkg.sharding.spec import AttentionSharding

StaticImplementation = str | Implementation | tuple[str | Implementation, ...] | None
"""`implementation=` of `attention_tkg` and `attention_cte`, in its hashable forms."""


@dataclass(frozen=True)
class AttentionConfig:
    """Sizes and options of an attention layer; what is None is not used.

    Attributes:
        model_dim: width D of the residual stream.
        num_heads: query heads N.
        num_kv_heads: key and value heads K; N is a multiple of K.
        head_dim: width H of queries and keys.
        value_head_dim: width Hv of values, by default H.
        qkv_bias: whether the query, key and value projections have a bias.
        out_bias: whether the output projection has one.
        qk_norm_eps: epsilon of an RMS norm of each query and key head, before the rotation.
        rope: rotation of queries and keys by their positions.
        fused_rope: decode steps attend before they append, so that the op rotates: inside the
            decode kernel where that runs. The new keys are beside the cache, not yet rounded to its
            dtype. Elsewhere the cache is read before it is written, for which XLA may copy it.
        sliding_window: number of keys a query sees, its own and those before it (as in Mistral).
        use_sinks: whether each query head has a learned sink logit.
        logits_soft_cap: c in `c * tanh(logit / c)`.
        scale: factor of the logits, by default 1 / sqrt(H).
        implementation: as for `jax_tkg.attention_tkg`, a sequence as a tuple; names count for
            `jax_tkg.attention_cte` too, which takes in prompts.
        append_implementation: as for `KVCache.append`, a sequence as a tuple.

    Raises:
        ValueError: for sizes that do not fit together.
    """

    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm_eps: float | None = None
    rope: RotaryEmbedding | None = None
    sliding_window: int | None = None
    use_sinks: bool = False
    logits_soft_cap: float | None = None
    scale: float | None = None
    implementation: StaticImplementation = None
    append_implementation: str | Writer | tuple[str | Writer, ...] | None = None
    fused_rope: bool = False

    def __post_init__(self) -> None:
        """Validates the sizes; `attention_tkg` checks the rest."""
        sizes = ("model_dim", "num_heads", "num_kv_heads", "head_dim", "value_dim")
        for name in (*sizes, "sliding_window"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"AttentionConfig: {name} must be at least 1, got {size}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                "AttentionConfig: num_heads must be a multiple of num_kv_heads, got "
                f"{self.num_heads} and {self.num_kv_heads}."
            )
        if self.fused_rope and self.rope is None:
            raise ValueError("AttentionConfig: fused_rope needs rope; give it, or leave both out.")
        if self.rope is not None:
            self.rope.frequencies(self.head_dim)  # raises if they do not fit

    @property
    def value_dim(self) -> int:
        """Hv: `value_head_dim`, or `head_dim` in its place."""
        return self.head_dim if self.value_head_dim is None else self.value_head_dim

    @property
    def local_window_size(self) -> tuple[int, int] | None:
        """The sliding window as `attention_tkg` takes it: (left, right), both inclusive."""
        return None if self.sliding_window is None else (self.sliding_window - 1, 0)

    def init_cache(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: npt.DTypeLike = jnp.float32,
        layout: str | type[DenseLayout] | None = None,
        ring_chunk: int | None = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        as_bits: bool | None = None,
        sharding: AttentionSharding | None = None,
    ) -> KVCache:
        """An empty cache for this layer.

        Args:
            batch: rows B.
            capacity: tokens a row can hold.
            dtype: see `KVCache.create`, likewise for what follows.
            layout: "BKSH", "BSKH", "BKHS" or the class; see there for the default.
            ring_chunk: keep only what a sliding window needs, in a `RingKVCache`, when at most
                this many tokens are appended at once. Without a sliding window, or when
                `capacity` is no larger than the ring, the cache is an ordinary one.
            k_scale: for 8-bit types.
            v_scale: likewise.
            as_bits: whether narrow floats are kept as raw bits.
            sharding: how the cache lies on a mesh.

        Raises:
            ValueError: as `KVCache.create`.
            TypeError: as `KVCache.create`.
        """
        kind: type[KVCache] = KVCache
        if ring_chunk is not None and self.sliding_window is not None:
            ring = ring_capacity(self.sliding_window, ring_chunk)
            kind, capacity = (RingKVCache, ring) if ring < capacity else (kind, capacity)
        return kind.create(
            batch,
            capacity,
            self.num_kv_heads,
            self.head_dim,
            value_head_dim=self.value_dim,
            dtype=dtype,
            layout=layout,
            k_scale=k_scale,
            v_scale=v_scale,
            as_bits=as_bits,
            sharding=sharding,
        )


def ring_capacity(sliding_window: int, num_tokens: int) -> int:
    """Slots a ring needs so that `num_tokens` can be appended before they attend.

    The earliest of them still sees its whole window: `sliding_window - 1` keys before its own.
    """
    return sliding_window + num_tokens - 1
