"""exponential: the Vector engine's own exp, on trn3."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jax_tkg.nki.interpreter import isa as nisa
from tests.interpreter.computing import BF16, F32, normal, refused, results, wide

TRN3 = {"target": "trn3"}
COMMAND = nisa.reduce_cmd


@pytest.mark.parametrize("kind", [F32, BF16, np.int8])
def test_exponential(kind: Any) -> None:
    x, top = (3 * normal(32, 2, 9)).astype(kind), normal(32, 1, seed=1)

    def body(dst, total, x, top):
        nisa.exponential(dst, x, top, reduce_res=total, reduce_cmd=COMMAND.reset_reduce)

    got, total = results(body, x, top, out=[((32, 18), BF16), ((32, 1), F32)], **TRN3)
    want = np.exp(wide(x).reshape(32, 18) - top)
    np.testing.assert_array_equal(got, want.astype(BF16))
    np.testing.assert_allclose(total, want.sum(1, keepdims=True), rtol=1e-6)


def test_exponential_accumulates_over_instructions() -> None:
    x, start = normal(8, 30), normal(8, 1, seed=1)

    def body(dst, total, x, start):
        nisa.exponential(dst[:, :10], x[:, :10], reduce_cmd=COMMAND.load_reduce, reduce_init=start)
        nisa.exponential(dst[:, 10:], x[:, 10:], reduce_cmd=COMMAND.reduce, reduce_res=total)

    got, total = results(body, x, start, out=[((8, 30), F32), ((8, 1), F32)], **TRN3)
    np.testing.assert_array_equal(got, np.exp(x))
    np.testing.assert_allclose(total, start + np.exp(x).sum(1, keepdims=True), rtol=1e-6)


def test_exponential_refusals() -> None:
    x, out = normal(8, 30), [((8, 30), F32), ((8, 1), F32)]

    def body(**kwargs: Any) -> Callable[..., None]:
        def issue(dst, total, x):
            given = {k: total if v == "total" else v for k, v in kwargs.items()}
            nisa.exponential(dst, x, **given)

        return issue

    refused("exponential.target", body(), x, out=out)
    refused("exponential.accumulator", body(reduce_res="total"), x, out=out, **TRN3)
    refused("exponential.accumulator", body(reduce_cmd=COMMAND.reduce), x, out=out, **TRN3)
    refused("exponential.reduce-cmd", body(reduce_cmd=COMMAND.reset), x, out=out, **TRN3)
    refused("exponential.reduce-init", body(reduce_init=1.0), x, out=out, **TRN3)
    fewer = [((4, 30), F32), out[1]]
    top = body(max_value="total")
    refused("exponential.vector-operand", top, x[:4], out=fewer, **TRN3)
    refused("exponential.dtype", body(), x, out=[((8, 30), np.uint32), out[1]], **TRN3)
    refused("exponential.rank", body(), normal(2, 1, 2, 3, 5), out=[((2, 30), F32), out[1]], **TRN3)
    refused(
        "exponential.reduce-res", body(reduce_res="total", reduce_cmd=COMMAND.reset_reduce), x,
        out=[out[0], ((8, 2), F32)], **TRN3,
    )  # fmt: skip
    refused(
        "exponential.dtype", body(reduce_res="total", reduce_cmd=COMMAND.reset_reduce), x,
        out=[out[0], ((8, 1), np.int32)], **TRN3,
    )  # fmt: skip


def test_an_idle_vector_instruction_leaves_the_registers_unknown() -> None:
    x, out = normal(8, 30), [((8, 30), F32), ((8, 1), F32)]

    def body(between: bool) -> Callable[..., None]:
        def issue(dst, total, x):
            nisa.exponential(dst, x, reduce_cmd=COMMAND.reset_reduce)
            if between:
                nisa.exponential(dst, x)
            nisa.exponential(dst, x, reduce_cmd=COMMAND.reduce, reduce_res=total)

        return issue

    _, total = results(body(False), x, out=out, **TRN3)
    np.testing.assert_allclose(total, 2 * np.exp(x).sum(1, keepdims=True), rtol=1e-6)
    refused("exponential.accumulator", body(True), x, out=out, **TRN3)
