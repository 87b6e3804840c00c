"""Several tokens a step for each row: the compiled step that verifies drafts, and what it gave.

A draft is what the row's own text said before (`PromptLookup`), found within the step. Token i of a
request is chosen with the random state of token i whether or not something was drafted there, and a
draft is accepted if it is that token: so speculation changes how many tokens a step gives, and no
token. Why that keeps the distribution: `jax_tkg.generation.verification.agreeing`.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_tkg._typing import Array, Bool, Int
from jax_tkg.generation.adaptive import Adaptive, Pace
from jax_tkg.generation.drafts import PromptLookup
from jax_tkg.generation.model import ScoringModel, truncate_caches
from jax_tkg.generation.speculation import (
    are_new,
    emitted_counts,
    newest_tokens,
    within,
    write_tokens,
)
from jax_tkg.generation.verification import agreeing
from jax_tkg.serving.programs import Chosen, DecodeRows, bound, choose, without_rows

Carry = tuple[Any, Array, Array, Array]
"""Of the loop: caches, texts, tokens made of each row, and whether it goes on."""


@partial(
    jax.tree_util.register_dataclass, data_fields=["chosen", "counts", "drafted"], meta_fields=[]
)
@dataclass(frozen=True)
class Verified:
    """What the steps of a call gave; n steps, T = `max_tokens + 1`.

    Attributes:
        chosen: its arrays begin with `[n, B, T]`; the first `counts` tokens of a step count.
        counts: int32 `[n, B]`, 0 for a row that had ended.
        drafted: int32 `[n, B]`, drafts that were verified.
    """

    chosen: Chosen
    counts: Any
    drafted: Any


@dataclass(frozen=True)
class SpeculationUsage:
    """What became of the drafts of an engine; sums over requests.

    Attributes:
        steps: steps that gave a request tokens, its first token (of its prompt) aside.
        drafted: drafts that these verified.
        accepted: drafts that were chosen.
        undrafted: steps among these of calls that drafted nothing.
        now: what the next call will do, and why.
    """

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    undrafted: int = 0
    now: str = ""

    @property
    def tokens_per_step(self) -> float:
        """1 without any draft accepted, and 0 without a step."""
        return (self.steps + self.accepted) / self.steps if self.steps else 0.0

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.tokens_per_step:.2f} tokens a step, {self.accepted} of {self.drafted} drafts "
            f"accepted, {self.undrafted} of {self.steps} steps without drafts; {self.now}"
        )


class Drafting:
    """Whether an engine drafts now, and what came of it."""

    def __init__(self, rule: Adaptive | None) -> None:
        """Nothing drafted yet; without a rule, nothing ever."""
        self._pace = None if rule is None else Pace(rule)
        self._sum = SpeculationUsage()

    @property
    def wanted(self) -> bool:
        """Whether the next call should draft."""
        return self._pace is not None and self._pace.speculates

    @property
    def usage(self) -> SpeculationUsage:
        """So far."""
        now = "not asked to speculate" if self._pace is None else str(self._pace)
        return replace(self._sum, now=now)

    def verified(self, counts: np.ndarray, drafted: np.ndarray) -> None:
        """After a call that drafted; int32 `[n, B]` as in `Verified`."""
        row_steps, tokens = int((counts > 0).sum()), int(counts.sum())
        self._sum = replace(
            self._sum,
            steps=self._sum.steps + row_steps,
            drafted=self._sum.drafted + int(drafted.sum()),
            accepted=self._sum.accepted + tokens - row_steps,
        )
        assert self._pace is not None
        steps = int((counts > 0).sum(axis=0).max())
        self._pace.took(steps=steps, row_steps=row_steps, tokens=tokens)

    def decoded(self, made: np.ndarray) -> None:
        """After a call that did not; int32 `[B]`, tokens of each row."""
        tokens = int(made.sum())
        self._sum = replace(
            self._sum, steps=self._sum.steps + tokens, undrafted=self._sum.undrafted + tokens
        )
        # Where drafts were wanted, and there were no pages for them, nothing was learnt.
        if self._pace is not None and not self._pace.speculates:
            self._pace.took(steps=int(made.max()), row_steps=tokens, tokens=tokens)


@partial(jax.jit, static_argnames=("drafter", "num_steps", "top"), donate_argnames="pools")
def decode_speculatively(
    model: ScoringModel,
    pools: Any,
    rows: DecodeRows,
    texts: Int[Array, "B W"],
    *,
    drafter: PromptLookup,
    num_steps: int,
    top: int,
) -> tuple[Verified, Any]:
    """As `programs.decode`, with up to `drafter.max_tokens + 1` tokens of each row a step.

    Args:
        model: a pytree.
        pools: from `make_pools`; are donated: use the returned ones.
        rows: as there; `words` are those of as many tokens as all steps can give,
            `num_steps * (max_tokens + 1)`.
        texts: int32 `[B, W]`, all tokens of each row, the newest last: `lengths + 1` of them. W
            holds also the new ones, `lengths + 1 + budget` at the most.
        drafter: static.
        num_steps: static, the trip count of the loop.
        top: static, how many of the most likely tokens to tell.

    Returns:
        What the steps gave, and the pools.
    """

    def step(carry: Carry, _: None) -> tuple[Carry, Verified]:
        caches, texts, made, alive = carry
        lengths = rows.lengths + 1 + made
        drafts = drafter.draft(texts, lengths, alive, ())[0]
        # Pages are there for the budget and no more.
        drafts = within(drafts, rows.budget - made, alive)
        block = jnp.concatenate([newest_tokens(texts, lengths), drafts.tokens], axis=1)
        logits, caches = model(block, caches, jnp.where(alive, drafts.counts + 1, 0))
        chosen = _choose_all(logits, rows, made, top)
        ends = _ends(chosen.tokens, rows)
        counts = emitted_counts(agreeing(drafts, chosen.tokens), ends, alive)
        texts = write_tokens(texts, lengths, chosen.tokens, counts)
        made = made + counts
        alive &= ~jnp.any(are_new(chosen.tokens, counts) & ends, axis=1) & (made < rows.budget)
        caches = truncate_caches(model, caches, rows.lengths + made)
        return (caches, texts, made, alive), Verified(chosen, counts, drafts.counts)

    caches = bound(pools, rows.table, rows.lengths)
    alive = (rows.budget > 0) & ~_ends(rows.tokens[:, None], rows)[:, 0]
    start: Carry = (caches, texts, jnp.zeros_like(rows.lengths), alive)
    (caches, _, _, _), verified = lax.scan(step, start, length=num_steps)
    return verified, without_rows(caches)


def _ends(tokens: Array, rows: DecodeRows) -> Bool[Array, "B T"]:
    """Which tokens `[B, T]` end their row."""
    return jnp.any(tokens[:, :, None] == rows.eos_ids[:, None, :], axis=2)


def _choose_all(logits: Array, rows: DecodeRows, made: Array, top: int) -> Chosen:
    """What each row chooses at every place, by its own rule and with the place's random state."""
    batch, width, vocabulary = logits.shape
    selection, words = rows.selection, None
    if selection is not None:
        selection = jax.tree.map(lambda setting: jnp.repeat(setting, width), selection)
        index = made[:, None] + jnp.arange(width, dtype=jnp.int32)
        words = jnp.take_along_axis(rows.words, index[:, :, None], axis=1, mode="clip")
        words = words.reshape(batch * width, -1)
    flat = choose(logits.reshape(batch * width, vocabulary), selection, words, top)
    return jax.tree.map(lambda x: x.reshape(batch, width, *x.shape[1:]), flat)
