"""What a swap did: which attention layers now run on jax_tkg, how, and what it left alone."""

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from jax_tkg.attention import Explanation


class SwapError(RuntimeError):
    """A swap that would not have had the effect it was asked for."""


class SwapWarning(UserWarning):
    """A swap that works, with something about the client that its user should know."""


@dataclass(frozen=True)
class SwappedLayer:
    """One attention layer that runs on jax_tkg.

    Attributes:
        path: of the module in its model, "model/layers/0/self_attn".
        class_name: of the module.
        num_heads: query heads N.
        num_kv_heads: key and value heads K.
        head_dim: H.
        cache: where its keys and values are and how they lie there; "none" without a cache.
        runs: the distinct calls that were traced, with the implementation of each and why it.
    """

    path: str
    class_name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    cache: str
    runs: tuple[Explanation, ...]

    @property
    def implementations(self) -> tuple[str, ...]:
        """What its calls run on, such as ("attention_cte: xla", "attention_tkg: xla")."""
        return tuple(dict.fromkeys(f"{r.problem.op}: {r.implementation}" for r in self.runs))

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.path}: {self.class_name} N={self.num_heads} K={self.num_kv_heads} "
            f"H={self.head_dim}, cache {self.cache}, {', '.join(self.implementations)}"
        )


@dataclass(frozen=True)
class LeftAlone:
    """An attention layer that an adapter knows but does not swap.

    Attributes:
        path: as in `SwappedLayer`.
        class_name: likewise.
        reason: in words.
    """

    path: str
    class_name: str
    reason: str


@dataclass
class SwapReport:
    """What a swap has done so far; it grows while the client is traced. `print` it.

    Attributes:
        adapters: name of each adapter used, with its client's version ("hf_llama of transformers
            4.57.6").
        seen: names of all the module classes that ran, for those that wonder why nothing was
            swapped.
        notes: what is known of the clients that their user should know; each was a warning.
    """

    adapters: list[str] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _layers: dict[str, SwappedLayer] = field(default_factory=dict)
    _left: dict[str, LeftAlone] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[SwappedLayer, ...]:
        """The swapped layers, each once, in the order in which they were first called."""
        return tuple(self._layers.values())

    @property
    def left_alone(self) -> tuple[LeftAlone, ...]:
        """Attention layers that were recognised and not swapped."""
        return tuple(self._left.values())

    def __len__(self) -> int:
        """How many layers were swapped."""
        return len(self._layers)

    def __iter__(self) -> Iterator[SwappedLayer]:
        """The swapped layers."""
        return iter(self.layers)

    def add(self, layer: SwappedLayer) -> None:
        """Records a call of a swapped layer; calls of one path are joined."""
        known = self._layers.get(layer.path)
        runs = () if known is None else known.runs
        new = tuple(run for run in layer.runs if run not in runs)
        self._layers[layer.path] = replace(layer, runs=runs + new)

    def leave(self, layer: LeftAlone) -> None:
        """Records a layer that was recognised and not swapped."""
        self._left.setdefault(layer.path, layer)

    def use(self, adapter: str) -> None:
        """Records that an adapter is in use."""
        _once(self.adapters, adapter)

    def see(self, class_name: str) -> None:
        """Records that a module of a class ran."""
        _once(self.seen, class_name)

    def note(self, text: str) -> None:
        """Records something about a client, and warns of it the first time.

        Warns:
            SwapWarning: with that text.
        """
        if text not in self.notes:
            self.notes.append(text)
            warn(text)

    def require(self, layers: int | None = None) -> None:
        """Raises unless layers were swapped, and as many as expected.

        Raises:
            SwapError: if none was, or another number than `layers`.
        """
        if not self._layers:
            raise SwapError(self._why_nothing())
        if layers is not None and layers != len(self):
            raise SwapError(
                f"{len(self)} layers were swapped and {layers} expected. What ran: "
                f"{', '.join(self.seen)}. Modules under flax.linen.jit or scan are traced once for "
                f"several layers, or not at all where an earlier trace is reused.\n{self}"
            )

    def _why_nothing(self) -> str:
        if not self.seen:
            return (
                "nothing was swapped: no module ran inside the swap. Either the model was not "
                "called, or all that was called had been traced before (jax.jit, flax.linen.jit) "
                "and its old trace ran. Trace it inside the swap: a new jax.jit of the function, "
                "or jax.clear_caches() before."
            )
        left = [f"{x.path} ({x.class_name}): {x.reason}" for x in self.left_alone]
        if left:
            return "nothing was swapped: " + "; ".join(left) + "."
        return (
            "nothing was swapped: no module of a class that an adapter knows ran inside the swap. "
            f"What ran: {', '.join(self.seen)}. Either none of them is attention of a known client "
            "(give your own adapter, see docs/swap.md), or their attention is under flax.linen.jit "
            "and was traced before: call jax.clear_caches() first."
        )

    def __str__(self) -> str:
        """A table: layers that differ only in their number are one line."""
        lines = [f"{len(self)} layers swapped, {', '.join(self.adapters) or 'no adapter'}"]
        groups: dict[tuple[object, ...], list[SwappedLayer]] = {}
        for layer in self.layers:
            alike = replace(layer, path=re.sub(r"\d+", "*", layer.path))
            groups.setdefault((alike.path, alike.cache, alike.implementations), []).append(layer)
        for (path, cache, _), members in groups.items():
            one = members[0]
            name = one.path if len(members) == 1 else path
            lines.append(
                f"  {len(members):3} x {name}: {one.class_name}, N={one.num_heads} "
                f"K={one.num_kv_heads} H={one.head_dim}, cache {cache}"
            )
            lines += [f"        {line}" for line in _runs(one)]
        lines += [f"  left alone: {x.path} ({x.class_name}): {x.reason}" for x in self.left_alone]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def _runs(layer: SwappedLayer) -> list[str]:
    """One line for each op, sizes of the first call."""
    lines: dict[str, str] = {}
    for run in layer.runs:
        name = f"{run.problem.op} on {run.platform}: {run.implementation}"
        reasons = "".join(f"; not {other}: {reason}" for other, reason in run.rejected)
        lines.setdefault(name, f"{name} ({run.plan}){reasons}")
    return list(lines.values())


def _once(names: list[str], name: str) -> None:
    if name not in names:
        names.append(name)


def warn(message: str) -> None:
    """A `SwapWarning` that points at the user's code."""
    warnings.warn(message, SwapWarning, stacklevel=3)
