"""Swaps the attention of linen decoders while they are traced: a context, or a wrapper of `apply`.

with swap_linen() as report:
    logits = model(ids, params=params)
print(report)
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from flax import linen as nn

from jax_tkg.flax_layers.config import StaticImplementation
from jax_tkg.flax_layers.swap.adapters import LINEN_ADAPTERS
from jax_tkg.flax_layers.swap.linen_cache import ClientVariables, Keeper, attend
from jax_tkg.flax_layers.swap.protocol import Directory, LinenAdapter
from jax_tkg.flax_layers.swap.report import LeftAlone, SwappedLayer, SwapReport
from jax_tkg.flax_layers.swap.trace_key import trace_key

_traced_for = trace_key()


class LinenSwap:
    """A swap of the attention of linen modules; made by `swap_linen`.

    Used with `with`, or called with a function to wrap it. It may be entered again and again: what
    was compiled inside it is found again there, and only there (with a JAX that has
    `jax.make_user_context`; without it, a jitted function keeps the trace it was first called
    with, and the swap raises where it sees that it had no effect).

    Attributes:
        report: what was swapped so far.

    Args:
        adapters: of the classes to swap.
        keeper: where keys and values are.
        implementation: of the attention.
        layers: how many must be swapped, if that is known.
        report: to go on with; by default a new one.
        key: equal for swaps whose compiled programs are the same; by default this swap alone.
    """

    report: SwapReport

    def __init__(
        self,
        adapters: Sequence[LinenAdapter],
        keeper: Keeper,
        implementation: StaticImplementation,
        layers: int | None,
        report: SwapReport | None = None,
        key: object = None,
    ) -> None:
        self.report = SwapReport() if report is None else report
        self._directory = Directory(tuple(adapters), self.report)
        self._keeper, self._implementation, self._layers = keeper, implementation, layers
        self._key = self if key is None else key
        self._entered: list[contextlib.ExitStack] = []

    def __enter__(self) -> SwapReport:
        stack = contextlib.ExitStack()
        stack.enter_context(nn.intercept_methods(self._intercept))
        stack.enter_context(_traced_for(self._key))
        self._entered.append(stack)
        return self.report

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._entered.pop().close()
        if kind is None:
            self.report.require(self._layers)

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, such as a module's `apply`, with the swap active whenever it runs.

        Raises:
            SwapError: when it is called, as the context does.
        """

        @functools.wraps(function)
        def swapped(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return swapped

    def _intercept(
        self,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module = context.module
        self.report.see(type(module).__name__)
        adapter = self._directory.find(type(module))
        if adapter is None or context.method_name != "__call__":
            return call(*args, **kwargs)
        path, class_name = "/".join(module.path), type(module).__name__
        reason = adapter.is_for(module)
        if reason is not None:
            self.report.leave(LeftAlone(path, class_name, reason))
            return call(*args, **kwargs)
        for note in adapter.notes(module):
            self.report.note(note)
        bound = inspect.signature(type(module).__call__).bind(module, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(list(bound.arguments.items())[1:])
        reason = adapter.why_not(module, arguments)
        if reason is not None:
            raise NotImplementedError(f"{path} ({class_name}) cannot be swapped: {reason}")
        return self._run(adapter, module, arguments)

    def _run(self, adapter: LinenAdapter, module: Any, arguments: dict[str, Any]) -> Any:
        read = adapter.read(module, arguments)
        held = self._keeper.hold(module, read)
        out, explanation = attend(read, held, self._implementation)
        layer = SwappedLayer(
            path="/".join(module.path),
            class_name=type(module).__name__,
            num_heads=read.query.shape[2],
            num_kv_heads=read.key.shape[2],
            head_dim=read.query.shape[3],
            cache=held.described,
            runs=(explanation,),
        )
        self.report.add(layer)
        return adapter.finish(module, arguments, out)


def swap_linen(
    adapters: Sequence[LinenAdapter] | None = None,
    *,
    layers: int | None = None,
    implementation: StaticImplementation = None,
    keeper: Keeper | None = None,
) -> LinenSwap:
    """Swaps the attention of the linen modules that run inside it.

    Parameters, caches and their names stay the client's. Nothing is swapped that was traced before
    and is not traced again; see `LinenSwap`. Leaving the context raises if nothing was swapped.

    Args:
        adapters: for classes of one's own; by default those of jax_tkg.
        layers: how many layers must be swapped.
        implementation: as for `jax_tkg.attention_tkg`.
        keeper: where keys and values are; by default in the client's variables.

    Returns:
        A context manager that gives the `SwapReport`; called with a function, it wraps it.

    Raises:
        SwapError: on leaving, if no layer was swapped, or not `layers`.
        NotImplementedError: for a call that needs what this attention never has, such as its
            weights.

    Warns:
        SwapWarning: for a client of an untested version, and for what it is known to get wrong.
    """
    return LinenSwap(
        LINEN_ADAPTERS if adapters is None else adapters,
        ClientVariables() if keeper is None else keeper,
        implementation,
        layers,
    )
