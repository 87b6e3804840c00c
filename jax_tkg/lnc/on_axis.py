"""The two programs as two devices: for use inside `jax.shard_map`, over a mesh axis of size 2.

This is how one logical core of two is used as two devices: where the Neuron runtime is set to one
physical core a device. Each device holds its own half of what the plan splits.
"""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh

from jax_tkg import _compat
from jax_tkg._typing import Array
from jax_tkg.attention import prepare
from jax_tkg.lnc.exchange import AXIS, in_order
from jax_tkg.lnc.program import run_program
from jax_tkg.lnc.shares import Split, localise, split_of
from jax_tkg.nki.arguments import kernel_limits, plan_kernel
from jax_tkg.operands import Operands
from jax_tkg.prefill.backward import attention_backward
from jax_tkg.problem import AttentionProblem
from jax_tkg.sharding import AttentionSharding

if TYPE_CHECKING:
    from jax_tkg.nki.plan import KernelPlan

PROGRAMS = 2


def plan_on_axis(*args: Any, exchange: str = "deferred", **kwargs: Any) -> "KernelPlan":
    """The plan of a whole problem for two devices that each hold a part of it.

    The kernel's plan, but for one thing: which slots a device has is fixed, so there is no loop
    over the live keys of both.

    Args:
        *args: as for `jax_tkg.attention_tkg`, of the whole problem; `jax.ShapeDtypeStruct`s will
            do for arrays.
        exchange: "deferred" or "every tile".
        **kwargs: as for the op.

    Raises:
        ValueError: for a problem whose parts would not be equally large, or that the op refuses.
        TypeError: as the op.
        NotImplementedError: for a problem that the kernel cannot do.
    """
    leaves, tree = jax.tree.flatten((args, kwargs))
    is_array = [isinstance(x, jax.ShapeDtypeStruct | jax.Array) for x in leaves]
    problems: list[AttentionProblem] = []

    def trace(arrays: list[Array]) -> None:
        given = iter(arrays)
        filled = [next(given) if a else x for a, x in zip(is_array, leaves, strict=True)]
        call_args, call_kwargs = jax.tree.unflatten(tree, filled)
        problems.append(prepare(*call_args, **call_kwargs).problem)

    jax.eval_shape(trace, [x for a, x in zip(is_array, leaves, strict=True) if a])
    return _plan(problems[0], exchange)


def _plan(problem: AttentionProblem, exchange: str) -> "KernelPlan":
    if (reason := kernel_limits(problem)) is not None:
        raise NotImplementedError(reason)
    plan = plan_kernel(replace(problem, has_positions=True), PROGRAMS, exchange)
    split = split_of(plan, problem.kv.slot_multiple)
    sizes = [end - first for first, end in split.parts]
    if split.letter and (len(set(sizes)) > 1 or split.width != sizes[0]):
        what = {"B": "sequences", "K": "KV heads", "S": "slots"}[split.letter]
        unit = 2 * max(128, problem.kv.slot_multiple) if split.letter == "S" else 2
        raise ValueError(
            f"the plan gives the two programs {sizes[0]} and {sizes[1]} {what} ({plan.reason}); "
            f"devices need equally many: make it a multiple of {unit}."
        )
    return plan


def sharding_of(
    plan: "KernelPlan", mesh: Mesh | AbstractMesh, axis_name: str = AXIS
) -> AttentionSharding:
    """What of the arrays the axis splits, as the plan says; `spec` gives the PartitionSpecs."""
    letter = split_of(plan).letter
    role = {"B": "batch", "K": "heads", "S": "keys"}.get(letter)
    merge = plan.exchange if letter == "S" else "deferred"
    return AttentionSharding(mesh, **({role: axis_name} if role else {}), merge=merge)


def attend_on_axis(
    plan: "KernelPlan",
    *args: Any,
    axis_name: str = AXIS,
    share_results: bool = False,
    **kwargs: Any,
) -> tuple[Array, Array]:
    """What one of two devices does of an attention call; inside `shard_map` or `vmap`.

    Differentiable in reverse mode.

    Args:
        plan: of the whole problem, from `plan_on_axis`.
        *args: as for `jax_tkg.attention_tkg`, this device's part, as `sharding_of(plan, mesh)`
            says: half of the rows, of the KV heads with their query heads, or of the slots. Lengths
            and positions are those of whole sequences; a mask or bias of a split cache has this
            device's slots and, behind them, all new keys.
        axis_name: of the mapped axis of size 2.
        share_results: where rows or heads are split, exchange the results, so that both devices
            have all of them.
        **kwargs: as for the op, but `implementation`, `rope`, `sharding` and `return_residual`.

    Returns:
        The output `[B, T, N, Hv]` in the query's dtype and the log-sum-exp `[B, T, N]`: of this
        device's rows, or where slots are split of all rows, the same bits on both. `shard_map`
        cannot know that they are the same: give it `check_vma=False` to return them once.

    Raises:
        ValueError: if the axis or the arrays are not what the plan says.
        TypeError: as the op.
    """
    if (size := lax.axis_size(axis_name)) != PROGRAMS:
        raise ValueError(f"the axis {axis_name!r} has size {size}; two programs need size 2.")
    if refused := sorted({"rope", "sharding"} & kwargs.keys()):
        raise ValueError(
            f"{' and '.join(refused)}: leave it out here; rotate queries and new keys before, and "
            "say in shard_map how arrays are split."
        )
    arrays = {name: jnp.asarray(x) for name, x in kwargs.items() if name in _ROWS and x is not None}
    call = prepare(*args, **(kwargs | arrays))
    split = split_of(plan, call.problem.kv.slot_multiple)
    _check_part(call.problem, plan, split)
    problem, ops = localise(call.problem, call.operands, plan, split, axis_name)
    leaves, tree = jax.tree.flatten(ops)
    ops = jax.tree.unflatten(tree, _compat.agree_on_varying_axes(leaves))
    out, lse = _attend(problem, plan, split, axis_name, ops)
    if share_results and split.letter in ("B", "K"):
        at = 0 if split.letter == "B" else 2
        out, lse = (_shared(x, axis_name, at) for x in (out, lse))
    return out, lse


_ROWS = ("key_value_seq_lengths", "key_value_seq_starts")


def _shared(mine: Array, axis: str, at: int) -> Array:
    theirs = lax.ppermute(mine, axis, ((0, 1), (1, 0)))
    return jnp.concatenate(in_order(mine, theirs, axis), at)


def _check_part(problem: AttentionProblem, plan: "KernelPlan", split: Split) -> None:
    found = {"B": problem.batch, "N": problem.num_heads, "K": problem.num_kv_heads}
    found |= {"S": problem.kv_len, "T": problem.num_tokens, "H": problem.head_dim}
    whole = {"B": plan.batch, "N": plan.heads, "K": plan.kv_heads}
    whole |= {"S": plan.slots, "T": plan.tokens, "H": plan.head_dim}
    halved = {"B": "B", "K": "NK", "S": "S"}.get(split.letter, "")
    needed = {name: n // PROGRAMS if name in halved else n for name, n in whole.items()}
    wrong = [name for name in found if found[name] != needed[name]]
    if wrong:
        given, wanted = (
            ", ".join(f"{name}={sizes[name]}" for name in wrong) for sizes in (found, needed)
        )
        raise ValueError(
            f"this device's arrays have {given}; the plan ({plan.sharding} sharding, "
            f"{plan.reason}) gives each device {wanted}: place them as "
            "jax_tkg.lnc.on_axis.sharding_of(plan, mesh) says."
        )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _attend(
    problem: AttentionProblem, plan: "KernelPlan", split: Split, axis: str, ops: Operands
) -> tuple[Array, Array]:
    out, lse = run_program(problem, ops, plan, split, axis)
    return out.astype(problem.query_dtype), lse


def _forward(
    problem: AttentionProblem, plan: "KernelPlan", split: Split, axis: str, ops: Operands
) -> tuple[tuple[Array, Array], tuple[Operands, tuple[Array, Array]]]:
    results = _attend(problem, plan, split, axis, ops)
    return results, (ops, results)


def _backward(
    problem: AttentionProblem,
    plan: "KernelPlan",
    split: Split,
    axis: str,
    residuals: tuple[Operands, tuple[Array, Array]],
    cotangents: tuple[Array, Array],
) -> tuple[Operands]:
    """Each device's keys have the cotangents of its slots, from both devices' results.

    The sink is in both results: each device counts half of what they all say of it.
    """
    ops, results = residuals
    if plan.sharding != "sequence":
        return (attention_backward(problem, ops, results, cotangents),)
    total = tuple(lax.psum(x, axis) for x in cotangents)
    total = tuple(_compat.agree_on_varying_axes([results[0], *total])[1:])
    found = attention_backward(problem, ops, results, total)
    sinks = None if found.sinks is None else found.sinks / PROGRAMS
    return (replace(found, sinks=sinks),)


_attend.defvjp(_forward, _backward)
