"""Writing new keys and values into a cache: a JAX primitive, so that the platform decides how.

On a Neuron device the append kernel writes them, elsewhere the in-place updates of
`KVLayout.write`; one is traced, the other is not. Sections in order: what is to be written, who can
write, the primitive, its rules.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from jax_tkg import _compat
from jax_tkg._typing import Array, Bool, Int, Num
from jax_tkg.cache.layouts import KVLayout, KVShape, LayoutTraits
from jax_tkg.choice import Choice, candidates, choose
from jax_tkg.lowering import lower_as_chosen, run_compiled
from jax_tkg.online.plan import Target

Layout = TypeVar("Layout", bound=KVLayout)

_WHAT = "write into a cache"


@dataclass(frozen=True)
class WriteProblem:
    """The static facts of a write.

    Attributes:
        layout: of the cache.
        shape: of the cache.
        tokens: new tokens T of each row.
        stored_shape: of the array of keys.
    """

    layout: LayoutTraits
    shape: KVShape
    tokens: int
    stored_shape: tuple[int, ...]


@runtime_checkable
class Writer(Protocol):
    """One way to write; hashable, without state."""

    @property
    def name(self) -> str:
        """Its name in `implementation=` and in reports."""

    def why_not(self, problem: WriteProblem, target: Target) -> str | None:
        """None if it can do this, else the reason in words."""

    def write(
        self,
        kv: Layout,
        key: Num[Array, "B T K H"],
        value: Num[Array, "B T K Hv"],
        slots: Int[Array, " B"],
        keep: Bool[Array, "B T"],
    ) -> Layout:
        """As `KVLayout.write`."""


@dataclass(frozen=True)
class InPlace:
    """The layout's own updates, on every platform."""

    name: str = "xla"

    def why_not(self, problem: WriteProblem, target: Target) -> str | None:
        """It can always do it."""
        del problem, target
        return None

    def write(self, kv: Layout, key: Array, value: Array, slots: Array, keep: Array) -> Layout:
        """As `KVLayout.write`."""
        return kv.write(key, value, slots, keep)


@dataclass(frozen=True)
class Split(InPlace):
    """The same where the compiler may split the cache: each device writes what falls on its part.

    Attributes:
        in_bounds: as in `KVLayout.write_split`.
    """

    in_bounds: bool = False

    def write(self, kv: Layout, key: Array, value: Array, slots: Array, keep: Array) -> Layout:
        """As `KVLayout.write`."""
        return kv.write_split(key, value, slots, keep, in_bounds=self.in_bounds)


WriterLike = str | Writer | Sequence[str | Writer] | None

IN_PLACE = InPlace()


def writers(implementation: WriterLike) -> tuple[Writer, ...]:
    """Reads `implementation=` of an append; see `jax_tkg.choice.candidates`."""
    from jax_tkg.nki.append_call import NKI_WRITER, NKI_WRITER_INTERPRET

    named = {w.name: w for w in (NKI_WRITER, IN_PLACE, NKI_WRITER_INTERPRET)}
    return candidates(implementation, named, (NKI_WRITER, IN_PLACE), Writer)


def choose_writer(
    kv: KVLayout, tokens: int, implementation: WriterLike = None, platform: str | None = None
) -> Choice[Writer]:
    """Says which of the writers would write `tokens` new tokens a row, and why not another.

    Args:
        kv: the cache's layout.
        tokens: T.
        implementation: None, a name ("nki", "xla", "nki_interpret"), a `Writer`, or several.
        platform: to be compiled for, by default JAX's own.
    """
    target = Target((jax.default_backend() if platform is None else platform,))
    return choose(_problem(kv, tokens), target, writers(implementation), _WHAT)


def write(
    kv: Layout,
    key: Num[Array, "B T K H"],
    value: Num[Array, "B T K Hv"],
    slots: Int[Array, " B"],
    keep: Bool[Array, "B T"],
    tried: tuple[Writer, ...],
) -> Layout:
    """`kv.write(key, value, slots, keep)` by what fits the platform compiled for.

    Args:
        kv: the cache's layout.
        key: new keys.
        value: new values.
        slots: token t of row b goes to slot `slots[b] + t`.
        keep: where not, it goes nowhere.
        tried: in order; see `writers`.

    Raises:
        NotImplementedError: if the one asked for cannot do it; with its reason.
        ExceptionGroup: if none of several can.
    """
    choose(_problem(kv, key.shape[1]), Target(platforms=()), tried, _WHAT).require()
    leaves, tree = jax.tree.flatten((kv, key, value, slots, keep))
    leaves = _compat.agree_on_varying_axes(leaves)
    new_key, new_value = _WRITE.bind(*leaves, tree=tree, tried=tried)
    return replace(kv, key=new_key, value=new_value)


def _problem(kv: KVLayout, tokens: int) -> WriteProblem:
    return WriteProblem(kv.traits, kv.shape, tokens, tuple(kv.key.shape))


# --- the primitive and its lowering

_WRITE = Primitive("cache_write")
_WRITE.multiple_results = True


def _choose(target: Target, *leaves: Array, tree: Any, tried: tuple[Writer, ...]) -> Writer:
    kv, key, *_ = jax.tree.unflatten(tree, leaves)
    chosen = choose(_problem(kv, key.shape[1]), target, tried, _WHAT).require()
    is_split = chosen == IN_PLACE and target.auto_partitioned
    return Split(in_bounds=target.platforms == ("neuron",)) if is_split else chosen


def _run(
    writer: Writer, target: Target, *leaves: Array, tree: Any, tried: tuple[Writer, ...]
) -> tuple[Array, Array]:
    del target, tried
    return _write(writer, tree, *leaves)


def _write(writer: Writer, tree: Any, *leaves: Array) -> tuple[Array, Array]:
    kv, *rest = jax.tree.unflatten(tree, leaves)
    with jax.named_scope(f"cache_write[{writer.name}]"):
        written = writer.write(kv, *rest)
    return written.key, written.value


def _abstract_eval(*leaves: Any, tree: Any, tried: Any) -> Any:
    del tried
    kv = jax.tree.unflatten(tree, leaves)[0]
    return kv.key, kv.value


# --- vmap and differentiation: of the layout's own updates, which JAX can see into


def _batch(leaves: Any, dims: Any, *, tree: Any, tried: Any) -> Any:
    del tried
    in_place = partial(_write, IN_PLACE, tree)
    return jax.vmap(in_place, in_axes=tuple(dims))(*leaves), (0, 0)


def _jvp(primals: Any, tangents: Any, *, tree: Any, tried: Any) -> Any:
    del tried
    moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]

    def in_place(*moved: Array) -> tuple[Array, Array]:
        given = dict(zip(moving, moved, strict=True))
        leaves = [given.get(i, x) for i, x in enumerate(primals)]
        return _write(IN_PLACE, tree, *leaves)

    results, found = jax.jvp(in_place, [primals[i] for i in moving], [tangents[i] for i in moving])
    return results, [_no_float0(x, t) for x, t in zip(results, found, strict=True)]


def _no_float0(primal: Array, tangent: Any) -> Any:
    """Rules say with a type that a number has no tangent, functions with an array."""
    if tangent.dtype == jax.dtypes.float0:
        return ad.Zero(jax.typeof(primal).to_tangent_aval())
    return tangent


_WRITE.def_abstract_eval(_abstract_eval)
run_compiled(_WRITE, ("tree", "tried"))
lower_as_chosen(_WRITE, _choose, _run)
batching.primitive_batchers[_WRITE] = _batch
ad.primitive_jvps[_WRITE] = _jvp
