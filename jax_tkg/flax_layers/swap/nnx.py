"""The swap for nnx models: attention modules get another class, in place and reversibly.

    swap = swap_nnx(model)  # or: with swap_nnx(model) as swap:
    print(swap.report)
    swap.restore()

A module is given a subclass of its own class in which an adapter has replaced the methods that
attend. Its variables and attributes stay what and where they are, so checkpoints load as before,
and `nnx.split`, `merge` and `clone` keep the swap. As the class is part of the graph definition,
`nnx.jit` compiles a swapped model anew and finds the old program again when it is restored.

A function that `jax.jit` traced before the swap with the model inside it (closed over, not an
argument) goes on running its old trace: `NnxSwap.require_in` finds that out.
"""

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import jax
from flax import nnx

from jax_tkg.attention import explain
from jax_tkg.flax_layers.config import StaticImplementation
from jax_tkg.flax_layers.swap.protocol import Adapter, Directory
from jax_tkg.flax_layers.swap.report import SwapError, SwappedLayer, SwapReport, warn
from jax_tkg.problem import Op

NOMINAL_SLOTS = 2048
"""Slots of the cache of the call that a report explains, as no call has been made yet."""


@dataclass(frozen=True)
class NnxLayer:
    """What an adapter says of one attention module.

    Attributes:
        num_heads: query heads N.
        num_kv_heads: key and value heads K.
        head_dim: H.
        dtype: of queries, keys and values.
        cache: where the cache is and how it lies, in words.
        options: the keywords of `attention_tkg` that its decode step gives, but the arrays.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: Any
    cache: str
    options: Mapping[str, Any]


@runtime_checkable
class NnxAdapter(Adapter, Protocol):
    """How the attention of one nnx class is replaced; see docs/swap.md for an example.

    Adapters are hashable and equal ones make equal classes, so that models swapped alike share what
    is compiled.
    """

    def why_not(self, module: Any) -> str | None:
        """None if the module can be swapped, else the reason in words; the swap raises it."""

    def notes(self, module: Any) -> Sequence[str]:
        """What the user should know about this client; each is warned of once."""

    def layer(self, module: Any) -> NnxLayer:
        """Sizes and options, for the report."""

    def methods(self, implementation: StaticImplementation) -> Mapping[str, Callable[..., Any]]:
        """What replaces the methods of these names; the module is the first argument.

        The functions use the projections, norms and position embedding of the module itself. A
        method of the original class is `type(module).__base__.name`.
        """


def builtin_adapters() -> tuple[NnxAdapter, ...]:
    """The adapters of `swap_nnx`: tunix's decoders, and Flax's own attention."""
    from jax_tkg.flax_layers.swap.adapters.flax_mha_nnx import FlaxMultiHeadAttention
    from jax_tkg.flax_layers.swap.adapters.tunix_gemma import TunixGemma, TunixGemma3
    from jax_tkg.flax_layers.swap.adapters.tunix_llama3 import TunixLlama3
    from jax_tkg.flax_layers.swap.adapters.tunix_qwen3 import TunixQwen3

    return TunixLlama3(), TunixQwen3(), TunixGemma(), TunixGemma3(), FlaxMultiHeadAttention()


@dataclass(frozen=True, eq=False)
class NnxSwap:
    """A model that has been swapped. As a context manager it restores the model at the end.

    Attributes:
        model: the model.
        report: the layers that were swapped. As nothing has been called yet, the implementation of
            each is that of a decode step: one row, one token, `NOMINAL_SLOTS` slots.
    """

    model: nnx.Module
    report: SwapReport

    def restore(self) -> None:
        """Gives every module its own class again; harmless if they have it."""
        restore_nnx(self.model)

    def require_in(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
        """Raises unless a function runs the swapped attention; nothing is computed.

        Args:
            step: a function, jitted or not, that calls the model.
            *args: what it would be called with.
            **kwargs: likewise.

        Returns:
            How many attention ops of this library its program has.

        Raises:
            SwapError: if there are fewer than swapped layers: it was traced before the swap and its
                old trace still runs, or it calls another model.
        """
        found = sum(1 for _ in _attention_ops(_trace(step, args, kwargs)))
        if found < len(self.report):
            name = getattr(step, "__name__", type(step).__name__)
            raise SwapError(
                f"{name} runs {found} attention ops of jax_tkg, and {len(self.report)} layers were "
                "swapped. It was traced before the swap with the model closed over, or it calls "
                "another model or only part of this one. Make a new jax.jit of the function after "
                "the swap, or make the model an argument (nnx.jit)."
            )
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()


def swap_nnx(
    model: nnx.Module,
    adapters: Sequence[NnxAdapter] | None = None,
    *,
    implementation: StaticImplementation = None,
    layers: int | None = None,
) -> NnxSwap:
    """Swaps the attention of an nnx model, in place.

    Args:
        model: any module; attention modules are looked for in all of it.
        adapters: what to look for; by default `builtin_adapters()`.
        implementation: of every attention call, as for `attention_tkg`, a sequence as a tuple.
        layers: how many layers must be found; by default at least one.

    Returns:
        What was swapped, and the way back.

    Raises:
        SwapError: if no attention module of a known class is in the model (the error names the
            classes that are), another number of them than `layers`, one that cannot be swapped, or
            one that has been already. The model is then as it was.
        ValueError: for an unknown implementation.

    Warns:
        SwapWarning: once for each thing a user should know about the client, such as a version that
            was not tested.
    """
    report = SwapReport()
    directory = Directory(builtin_adapters() if adapters is None else tuple(adapters), report)
    swapped: list[tuple[nnx.Module, type]] = []
    notes: dict[str, None] = {}
    options: Any = implementation  # hashable, which its type does not say
    for path, module in _modules(model):
        cls = type(module)
        report.see(cls.__name__)
        if adapter_of(module) is not None:
            raise SwapError(
                f"{path} is swapped already. Call restore() on what the first swap returned, or "
                "restore_nnx(model), before swapping it in another way."
            )
        adapter = directory.find(cls)
        if adapter is None:
            continue
        reason = adapter.why_not(module)
        if reason is not None:
            raise SwapError(f"{path} ({cls.__name__}) cannot be swapped: {reason}")
        notes |= dict.fromkeys(adapter.notes(module))
        report.add(_reported(path, module, adapter.layer(module), implementation))
        swapped.append((module, _swapped_class(cls, adapter, options)))
    _require(report, layers)
    for note in notes:
        warn(note)
    for module, cls in swapped:
        object.__setattr__(module, "__class__", cls)
    return NnxSwap(model, report)


def restore_nnx(model: nnx.Module) -> int:
    """Undoes `swap_nnx` on a model, or on a clone of one.

    Returns:
        How many modules were given their own class again.
    """
    swapped = [module for _, module in _modules(model) if adapter_of(module) is not None]
    for module in swapped:
        object.__setattr__(module, "__class__", type(module).__base__)
    return len(swapped)


def adapter_of(module: Any) -> NnxAdapter | None:
    """The adapter by which a module has been swapped, None if it has not."""
    adapter: NnxAdapter | None = vars(type(module)).get("_jax_tkg_adapter")
    return adapter


@cache
def _swapped_class(cls: type, adapter: Any, implementation: Any) -> type[nnx.Module]:
    """The subclass that takes a class's place; one for equal arguments, as jit caches go by it."""
    body = dict(adapter.methods(implementation)) | {
        "__module__": cls.__module__,
        "__doc__": f"{cls.__name__} with the attention of jax_tkg ({adapter.name}).",
        "_jax_tkg_adapter": adapter,
    }
    return types.new_class(f"Swapped{cls.__name__}", (cls,), {}, lambda ns: ns.update(body))


def _modules(model: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model must be a flax.nnx.Module, got {type(model).__name__}. For a linen model use "
            "swap_linen."
        )
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module):
            yield "/".join(map(str, path)) or type(node).__name__, node


def _require(report: SwapReport, layers: int | None) -> None:
    if not report:
        raise SwapError(
            "nothing was swapped: the model has no attention module of a class that an adapter "
            f"knows. Its modules are of: {', '.join(report.seen)}. Give your own adapter, see "
            "docs/swap.md."
        )
    if layers is not None and layers != len(report):
        raise SwapError(f"{len(report)} layers can be swapped and {layers} were expected.")


def _reported(
    path: str, module: nnx.Module, layer: NnxLayer, implementation: StaticImplementation
) -> SwappedLayer:
    shape: Any = jax.ShapeDtypeStruct
    keys = shape((1, NOMINAL_SLOTS, layer.num_kv_heads, layer.head_dim), layer.dtype)
    query = shape((1, 1, layer.num_heads, layer.head_dim), layer.dtype)
    return SwappedLayer(
        path=path,
        class_name=type(module).__name__,
        num_heads=layer.num_heads,
        num_kv_heads=layer.num_kv_heads,
        head_dim=layer.head_dim,
        cache=layer.cache,
        runs=(explain(query, keys, keys, implementation=implementation, **layer.options),),
    )


def _trace(step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The jaxpr that a call would run: the one that jit has kept, if it has."""
    trace: Any = getattr(step, "trace", None)
    if trace is None:
        return jax.make_jaxpr(step)(*args, **kwargs).jaxpr
    traced = trace(*args, **kwargs)
    return getattr(traced, "traced", traced).jaxpr  # nnx.jit wraps what jax.jit returns


def _attention_ops(jaxpr: Any) -> Iterator[Any]:
    """The equations of a jaxpr, and of those inside it, that are ops of this library."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name in set(Op):
            yield equation
        for leaf in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(leaf):
                yield from _attention_ops(leaf)


def _is_jaxpr(leaf: Any) -> bool:
    return hasattr(getattr(leaf, "jaxpr", leaf), "eqns")
