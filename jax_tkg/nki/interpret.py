"""Interpreted NKI kernels inside JAX programs: `interpret(kernel, *arrays, result=...)`.

A primitive, so that vmap maps the kernel and not what it is made of, and so that it can be typed
inside `shard_map`. On the CPU it lowers to a host callback which gets NumPy views of the buffers;
`jax.pure_callback` would hand over JAX arrays, and reading large ones there can hang.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from jax_tkg import _compat
from jax_tkg.lowering import run_compiled, target_of
from jax_tkg.nki.host import Host
from jax_tkg.nki.interpreter import Kernel, run

interpret_p = Primitive("nki_interpret")
interpret_p.multiple_results = True


def interpret(
    kernel: Callable[..., Any],
    *arrays: jax.Array,
    result: Any,
    programs: int | None = None,
    target: str = "trn2",
    exact: bool = False,
    static: Mapping[str, Any] | None = None,
    host: Host | None = None,
) -> Any:
    """Runs an NKI kernel in the interpreter, as part of a JAX computation on the CPU.

    Works under `jit`, `vmap` (one launch for each mapped element), `scan`, `shard_map` (one launch
    for each shard) and from several threads. It is not differentiable. Operands that the compiler
    has sharded are refused: call it inside `shard_map`.

    Args:
        kernel: an NKI kernel, decorated or not.
        *arrays: its array arguments, by position. The kernel gets copies of what it writes to.
        result: `jax.ShapeDtypeStruct`s of what it returns: one, or a tuple of them.
        programs: 1 or 2; None takes what `kernel[2]` says, else 1.
        target: trn1, trn2 or trn3.
        exact: keep every float as float32 inside.
        static: other arguments by name; values must be hashable.
        host: for a part of a program that is lowered after the program itself.

    Returns:
        Arrays as in `result`.

    Raises:
        ValueError: if the kernel returns something else than `result` says.
        NotImplementedError: when lowered for another platform than CPU, or when the compiler may
            split the operands between devices.

    An error of the kernel reaches the caller as a `jax.errors.JaxRuntimeError` with its message.
    """
    from jax_tkg.nki.dialect import interpreted

    structs, tree = jax.tree.flatten(result)
    made = kernel if isinstance(kernel, Kernel) else Kernel(kernel)
    if programs is not None:
        made = made[programs]
    outputs = interpret_p.bind(
        *_compat.agree_on_varying_axes([jax.numpy.asarray(a) for a in arrays]),
        kernel=interpreted(made.function),
        programs=made.programs,
        target=target,
        exact=exact,
        static=tuple(sorted((static or {}).items())),
        result=tuple((tuple(s.shape), np.dtype(s.dtype)) for s in structs),
        mapped=(),
        host=host,
    )
    return jax.tree.unflatten(tree, outputs)


# --- abstract evaluation


@interpret_p.def_abstract_eval
def _abstract_eval(*operands: Any, result: Any, mapped: Any, **_: Any) -> list[Any]:
    sizes = [_mapped_size(operands, mapped, level) for level in range(len(mapped))]
    return [_typed_like(operands, (*sizes, *shape), dtype) for shape, dtype in result]


def _mapped_size(operands: Sequence[Any], mapped: Any, level: int) -> int:
    """Length of the mapped axis of a level; each operand has those of its own levels in front."""
    flags = mapped[level]
    which = flags.index(True)
    axis = sum(mapped[i][which] for i in range(level))
    return int(operands[which].shape[axis])


def _typed_like(operands: Sequence[Any], shape: tuple[int, ...], dtype: np.dtype) -> Any:
    if not operands:
        return jax.core.ShapedArray(shape, dtype)
    like = operands[0]
    sharding = NamedSharding(like.sharding.mesh, PartitionSpec(*(None,) * len(shape)))
    return like.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)


# --- lowering


def _launch(
    *arrays: Any,
    kernel: Callable[..., Any],
    programs: int,
    target: str,
    exact: bool,
    static: Any,
    result: Any,
    mapped: Any,
) -> tuple[np.ndarray, ...]:
    """Runs the kernel for every mapped element; the host side of the primitive."""
    if mapped:
        size = _mapped_size(arrays, mapped, 0)
        flags, rest = mapped[0], mapped[1:]
        launches = [
            _launch(
                *(a[i] if is_mapped else a for a, is_mapped in zip(arrays, flags, strict=True)),
                kernel=kernel, programs=programs, target=target, exact=exact, static=static,
                result=result, mapped=rest,
            )
            for i in range(size)
        ]  # fmt: skip
        return tuple(np.stack(parts) for parts in zip(*launches, strict=True))
    outputs = run(
        kernel, *map(np.asarray, arrays), programs=programs, target=target, exact=exact,
        **dict(static),
    ).outputs  # fmt: skip
    got = outputs if isinstance(outputs, tuple | list) else (outputs,)
    _check_result(kernel, got, result)
    return tuple(np.ascontiguousarray(o) for o in got)


def _check_result(kernel: Callable[..., Any], got: Sequence[Any], result: Any) -> None:
    found = [(np.shape(o), getattr(o, "dtype", type(o))) for o in got]
    if found != list(result):
        raise ValueError(
            f"{kernel.__name__} returned {_describe(found)}; `result` says {_describe(result)}: "
            "pass the shapes and dtypes that the kernel declares for its outputs."
        )


def _describe(arrays: Sequence[Any]) -> str:
    return ", ".join(f"{dtype}{list(shape)}" for shape, dtype in arrays) or "nothing"


def _lower(ctx: mlir.LoweringRuleContext, *operands: Any, host: Host | None, **params: Any) -> Any:
    target = target_of(ctx)
    if target.platforms != ("cpu",):
        raise NotImplementedError(
            f"interpreted NKI kernels run on the CPU, not on {'+'.join(target.platforms)}: place "
            "the computation there with jax.jit(...).lower or jax.default_device."
        )
    if target.auto_partitioned:
        raise NotImplementedError(
            "an interpreted NKI kernel cannot be split by the compiler: call it inside "
            "jax.shard_map, where each device launches it on its shard."
        )
    if host is not None:
        return host.launch(ctx, partial(_launch, **params), operands)
    avals_in: Any = ctx.avals_in
    avals_out: Any = ctx.avals_out
    results, _, _ = mlir.emit_python_callback(
        ctx,
        partial(_launch, **params),
        None,
        operands,
        avals_in,
        avals_out,
        has_side_effect=False,
    )
    return results


mlir.register_lowering(interpret_p, _lower)

run_compiled(
    interpret_p, ("kernel", "programs", "target", "exact", "static", "result", "mapped", "host")
)


# --- batching


def _batch(operands: Any, dims: Any, *, mapped: Any, **params: Any) -> tuple[Any, Any]:
    moved = [
        x if d is None else jax.numpy.moveaxis(x, d, 0) for x, d in zip(operands, dims, strict=True)
    ]
    flags = tuple(d is not None for d in dims)
    results = interpret_p.bind(*moved, mapped=(flags, *mapped), **params)
    return results, [0] * len(results)


batching.primitive_batchers[interpret_p] = _batch
