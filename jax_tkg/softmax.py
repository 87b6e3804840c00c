"""Online softmax: the running maximum, sum and weighted output of rows seen so far.

One state serves every path: KV tiles fold into it one after another (`update`), two states over
different keys of the same rows combine (`merge`), and `finalize` divides once at the end. The
recurrence is Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), with the
output rescaled as in Dao et al., "FlashAttention" (2022), algorithm 1.

The maximum starts at the lowest finite float, not at -inf: a masked logit is -inf and
`exp(-inf - finite)` is 0, so a row whose tiles are all masked stays at sum 0 and no NaN can arise.
A logit that is NaN makes its row NaN: it is not taken for a row without keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jax_tkg._typing import Array, Float, Leaf

LOWEST = float(np.finfo(np.float32).min)
HIGHEST = float(np.finfo(np.float32).max)


@partial(
    jax.tree_util.register_dataclass, data_fields=["max", "sum", "output"], meta_fields=["key_axis"]
)
@dataclass(frozen=True)
class SoftmaxState:
    """Softmax over the keys seen so far.

    Attributes:
        max: running maximum of the logits, float32 `[*rows]`; finite.
        sum: sum of `exp(logit - max)`, float32 `[*rows]`; 0 where no key was visible.
        output: sum of `exp(logit - max) * value`, float32 `[*rows, Hv]`, not yet divided.
        key_axis: which axis of the logits given to `update` runs over keys.
    """

    max: Leaf
    sum: Leaf
    output: Leaf
    key_axis: int = -1

    @classmethod
    def init(cls, rows: Sequence[int], value_head_dim: int, key_axis: int = -1) -> "SoftmaxState":
        """The state of `rows` that have seen no key."""
        return cls(
            max=jnp.full(rows, LOWEST, jnp.float32),
            sum=jnp.zeros(rows, jnp.float32),
            output=jnp.zeros((*rows, value_head_dim), jnp.float32),
            key_axis=key_axis,
        )

    def update(
        self,
        logits: Float[Array, "..."],
        weigh_values: Callable[[Array], Array],
        agree: Callable[[Array], Array] | None = None,
    ) -> "SoftmaxState":
        """Folds in more keys.

        Args:
            logits: float32, `rows` with the keys on `key_axis`; -inf where a key is not visible.
            weigh_values: maps `exp(logits - max)`, of the logits' shape, to its product with the
                values of these keys, float32 `[*rows, Hv]`.
            agree: maps the new maximum to one that is not lower: that of all devices.
        """
        logits = jnp.minimum(logits, HIGHEST)  # +inf would give inf - inf
        new_max = jnp.maximum(self.max, jnp.max(logits, axis=self.key_axis))
        if agree is not None:
            new_max = agree(new_max)
        weights = jnp.exp(logits - jnp.expand_dims(new_max, self.key_axis))
        decay = jnp.exp(self.max - new_max)
        return SoftmaxState(
            max=new_max,
            sum=self.sum * decay + jnp.sum(weights, axis=self.key_axis),
            output=self.output * decay[..., None] + weigh_values(weights),
            key_axis=self.key_axis,
        )

    def merge(self, other: "SoftmaxState") -> "SoftmaxState":
        """The state over the keys of both; associative and commutative up to rounding."""
        new_max = jnp.maximum(self.max, other.max)
        mine, theirs = jnp.exp(self.max - new_max), jnp.exp(other.max - new_max)
        return SoftmaxState(
            max=new_max,
            sum=self.sum * mine + other.sum * theirs,
            output=self.output * mine[..., None] + other.output * theirs[..., None],
            key_axis=self.key_axis,
        )

    def add_sink(self, sink: Float[Array, "..."]) -> "SoftmaxState":
        """Adds a logit that joins the sum and has no value; broadcast against `rows`."""
        sink = jnp.minimum(jnp.broadcast_to(sink, self.max.shape).astype(jnp.float32), HIGHEST)
        new_max = jnp.maximum(self.max, sink)
        decay = jnp.exp(self.max - new_max)
        return SoftmaxState(
            max=new_max,
            sum=self.sum * decay + jnp.exp(sink - new_max),
            output=self.output * decay[..., None],
            key_axis=self.key_axis,
        )

    def finalize(self) -> tuple[Float[Array, "*rows Hv"], Float[Array, "*rows"]]:
        """Output `[*rows, Hv]` and log-sum-exp `[*rows]`; 0 and -inf for a row without a key."""
        seen = self.sum != 0  # NaN is seen
        total = jnp.where(seen, self.sum, 1.0)
        out = jnp.where(seen[..., None], self.output / total[..., None], 0.0)
        return out, jnp.where(seen, self.max + jnp.log(total), -jnp.inf)


def merge_attention(
    outputs: Sequence[Float[Array, "B T N Hv"]], lses: Sequence[Float[Array, "B T N"]]
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Combines attention over disjoint sets of keys into attention over all of them.

    With m = max of the log-sum-exps, part i has weight exp(lse_i - m); the weights are normalised
    at the end. A part in which a row saw no key (LSE -inf) has weight 0; if no part saw one the row
    is 0 with LSE -inf. A sink must have been counted by exactly one part.

    Args:
        outputs: partial outputs `[B, T, N, Hv]`, any float dtype.
        lses: their log-sum-exps `[B, T, N]`, natural log, float32.

    Returns:
        The merged output in the dtype of the first, and its float32 log-sum-exp.

    Raises:
        ValueError: if the sequences are empty or of different lengths.
    """
    if not outputs or len(outputs) != len(lses):
        raise ValueError(
            f"merge_attention needs as many outputs as log-sum-exps, at least one of each; "
            f"got {len(outputs)} outputs and {len(lses)} log-sum-exps."
        )
    stacked = jnp.stack([lse.astype(jnp.float32) for lse in lses])
    top = jnp.maximum(jnp.max(stacked, axis=0), LOWEST)
    weights = jnp.exp(stacked - top)
    total = jnp.sum(weights, axis=0)
    seen = total != 0  # NaN is seen
    safe = jnp.where(seen, total, 1.0)
    mixed = sum(
        (w / safe)[..., None] * out.astype(jnp.float32)
        for w, out in zip(weights, outputs, strict=True)
    )
    lse = jnp.where(seen, top + jnp.log(safe), -jnp.inf)
    return jnp.asarray(mixed).astype(outputs[0].dtype), lse
