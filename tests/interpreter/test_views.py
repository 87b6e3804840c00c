"""Views of tensors, against NumPy's views of the same numbers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jax_tkg.nki.interpreter import language as nl
from jax_tkg.nki.interpreter.errors import NkiError
from tests.interpreter.viewing import HBM, ON_CHIP, X, numbers, refuses, run, view_of

SAME_EVERYWHERE = [
    (lambda t: t[2:5], lambda a: a[2:5]),
    (lambda t: t[:, 1:4:2, ::3], lambda a: a[:, 1:4:2, ::3]),
    (lambda t: t[..., 2:], lambda a: a[..., 2:]),
    (lambda t: t[-3:, ..., :-1], lambda a: a[-3:, ..., :-1]),
    (lambda t: t[:, 3], lambda a: a[:, 3]),
    (lambda t: t[:, -1, 2:4], lambda a: a[:, -1, 2:4]),
    (lambda t: t[nl.ds(2, 4), :, nl.ds(1, 3)], lambda a: a[2:6, :, 1:4]),
    (lambda t: t.slice(1, 1, 4, 2), lambda a: a[:, 1:4:2]),
    (lambda t: t.select(2, 5), lambda a: a[:, :, 5]),
    (lambda t: t.permute((0, 2, 1)), lambda a: a.transpose(0, 2, 1)),
    (lambda t: t.expand_dim(2), lambda a: a[:, :, None]),
    (lambda t: t[:, :1].broadcast(1, 5), lambda a: np.broadcast_to(a[:, :1], (8, 5, 6))),
    (lambda t: t[:, 1:2].squeeze_dim(1), lambda a: a[:, 1]),
    (lambda t: t.reshape_dim(2, (2, -1)), lambda a: a.reshape(8, 4, 2, 3)),
    (lambda t: t.flatten_dims(1, 2), lambda a: a.reshape(8, 24)),
    (lambda t: t[:, 1:3].flatten_dims(1, 2), lambda a: a[:, 1:3].reshape(8, 12)),
    (lambda t: t.reshape((8, 3, 8)), lambda a: a.reshape(8, 3, 8)),
    (
        lambda t: t.rearrange(("p", "a", ("b", "c")), ("p", "c", "a", "b"), {"b": 2}),
        lambda a: a.reshape(8, 4, 2, 3).transpose(0, 3, 1, 2),
    ),
    (lambda t: t.rearrange(("p", "a", "b"), ("p", ("a", "b"))), lambda a: a.reshape(8, 24)),
]


@pytest.mark.parametrize("on_chip", [ON_CHIP, HBM])
@pytest.mark.parametrize("case", range(len(SAME_EVERYWHERE)))
def test_view_is_numpys(case: int, on_chip: bool) -> None:
    make, expected = SAME_EVERYWHERE[case]
    np.testing.assert_array_equal(view_of(X, make, on_chip), expected(X))


def test_partition_stays_on_chip_and_goes_in_hbm() -> None:
    np.testing.assert_array_equal(view_of(X, lambda t: t[3], ON_CHIP), X[3:4])
    np.testing.assert_array_equal(view_of(X, lambda t: t[3], HBM), X[3])
    np.testing.assert_array_equal(view_of(X, lambda t: t[:, 1, 2], ON_CHIP), X[:, 1, 2:3])
    np.testing.assert_array_equal(view_of(X, lambda t: t[:, 1, 2], HBM), X[:, 1, 2])
    np.testing.assert_array_equal(view_of(X, lambda t: t[7, 1, 2], ON_CHIP), X[7:8, 1, 2:3])
    np.testing.assert_array_equal(view_of(X, lambda t: t[7, 1, 2], HBM), X[7, 1, 2:3])


def test_hbm_moves_its_first_axis() -> None:
    np.testing.assert_array_equal(
        view_of(X, lambda t: t.permute((2, 0, 1)), HBM), X.transpose(2, 0, 1)
    )
    np.testing.assert_array_equal(view_of(X, lambda t: t[::3], HBM), X[::3])
    np.testing.assert_array_equal(view_of(X, lambda t: t.flatten_dims(0, 1), HBM), X.reshape(32, 6))
    np.testing.assert_array_equal(view_of(X, lambda t: t.expand_dim(0), HBM), X[None])


# Each refusal beside its nearest legal neighbour.
REFUSALS = [
    ("view.slice", ON_CHIP, lambda t: t[:, 0:5], lambda t: t[:, 0:4]),
    ("view.slice", HBM, lambda t: t[0:9], lambda t: t[0:8]),
    ("view.slice", HBM, lambda t: t[3:3], lambda t: t[3:4]),
    ("view.slice", HBM, lambda t: t[::-1], lambda t: t[::1]),
    ("view.slice", HBM, lambda t: t[nl.ds(6, 3)], lambda t: t[nl.ds(6, 2)]),
    ("view.index", ON_CHIP, lambda t: t[:, 4], lambda t: t[:, 3]),
    ("view.index", HBM, lambda t: t[-9], lambda t: t[-8]),
    ("view.index", HBM, lambda t: t[0, 0, 0, 0], lambda t: t[0, 0, 0]),
    ("view.index", HBM, lambda t: t[0, ..., ...], lambda t: t[0, ...]),
    ("view.index", HBM, lambda t: t["a"], lambda t: t[0]),
    ("view.axis", HBM, lambda t: t.slice(3, 0, 1), lambda t: t.slice(2, 0, 1)),
    ("view.partition-step", ON_CHIP, lambda t: t[::2], lambda t: t[::8]),
    ("view.permute", ON_CHIP, lambda t: t.permute((1, 0, 2)), lambda t: t.permute((0, 2, 1))),
    ("view.permute", HBM, lambda t: t.permute((0, 1, 1)), lambda t: t.permute((2, 1, 0))),
    ("view.broadcast", ON_CHIP, lambda t: t.broadcast(1, 8), lambda t: t[:, :1].broadcast(1, 8)),
    (
        "view.broadcast",
        ON_CHIP,
        lambda t: t[:1].broadcast(0, 8),
        lambda t: t[:1, :1].broadcast(1, 2),
    ),
    ("view.expand-dim", ON_CHIP, lambda t: t.expand_dim(0), lambda t: t.expand_dim(3)),
    ("view.expand-dim", HBM, lambda t: t.expand_dim(4), lambda t: t.expand_dim(3)),
    (
        "view.squeeze-dim",
        ON_CHIP,
        lambda t: t[:1].squeeze_dim(0),
        lambda t: t[:, :1].squeeze_dim(1),
    ),
    ("view.squeeze-dim", HBM, lambda t: t.squeeze_dim(1), lambda t: t[:, :1].squeeze_dim(1)),
    (
        "view.reshape-dim",
        ON_CHIP,
        lambda t: t.reshape_dim(0, (2, 4)),
        lambda t: t.reshape_dim(0, (8,)),
    ),
    (
        "view.reshape-dim",
        HBM,
        lambda t: t.reshape_dim(2, (4, -1)),
        lambda t: t.reshape_dim(2, (3, -1)),
    ),
    (
        "view.reshape-dim",
        HBM,
        lambda t: t.reshape_dim(2, (-2, -3)),
        lambda t: t.reshape_dim(2, (2, 3)),
    ),
    ("view.flatten", ON_CHIP, lambda t: t.flatten_dims(0, 1), lambda t: t.flatten_dims(1, 2)),
    ("view.reshape", ON_CHIP, lambda t: t.reshape((4, 48)), lambda t: t.reshape((8, 24))),
    ("view.reshape", ON_CHIP, lambda t: t.reshape((8, 23)), lambda t: t.reshape((8, 12, 2))),
    (
        "view.reshape",
        ON_CHIP,
        lambda t: t.permute((0, 2, 1)).reshape((8, 24)),
        lambda t: t.permute((0, 2, 1)).reshape((8, 2, 3, 4)),
    ),
    (
        "view.reshape",
        HBM,
        lambda t: t[:, :, 1:].flatten_dims(1, 2),
        lambda t: t[:, :, 1:].flatten_dims(0, 1),
    ),
    (
        "view.rearrange",
        HBM,
        lambda t: t.rearrange(("a", "b"), ("b", "a")),
        lambda t: t.rearrange(("a", "b", "c"), ("b", "a", "c")),
    ),
    (
        "view.rearrange",
        HBM,
        lambda t: t.rearrange(("a", "b", "c"), ("a", "b")),
        lambda t: t.rearrange(("a", "b", "c"), ("a", ("b", "c"))),
    ),
    (
        "view.dtype",
        ON_CHIP,
        lambda t: t[:, :, ::2].view("uint8"),
        lambda t: t[:, ::2].view("uint8"),
    ),
    (
        "view.ap-partition-step",
        ON_CHIP,
        lambda t: t.ap([[48, 4], [1, 24]]),
        lambda t: t.ap([[24, 4], [1, 24]]),
    ),
    (
        "memory.out-of-bounds",
        ON_CHIP,
        lambda t: t.ap([[24, 8], [1, 24]], offset=1),
        lambda t: t.ap([[24, 8], [1, 23]], offset=1),
    ),
    (
        "memory.out-of-bounds",
        HBM,
        lambda t: t.ap([[-1, 3]], offset=1),
        lambda t: t.ap([[-1, 3]], offset=2),
    ),
    (
        "memory.out-of-bounds",
        ON_CHIP,
        lambda t: t.ap([[24, 8], [1, 24]], offset=24),
        lambda t: t.ap([[24, 7], [1, 24]], offset=24),
    ),
]


@pytest.mark.parametrize("case", range(len(REFUSALS)))
def test_constraint_and_its_legal_twin(case: int) -> None:
    rule, on_chip, bad, good = REFUSALS[case]
    refuses(rule, X, bad, on_chip)
    view_of(X, good, on_chip)


def test_assignment_is_no_instruction() -> None:
    def kernel(x):
        x[0] = 1

    with pytest.raises(NkiError, match=r"view\.assignment"):
        run(kernel, X)


# Types.


@pytest.mark.parametrize("on_chip", [ON_CHIP, HBM])
@pytest.mark.parametrize("new", ["uint8", "int16", "uint32", "float32"])
def test_view_as_another_type(new: str, on_chip: bool) -> None:
    found = view_of(X, lambda t: t[:, 1:3].view(new), on_chip)
    np.testing.assert_array_equal(found, X[:, 1:3].view(new))


def test_narrow_types_join_where_they_are_aligned() -> None:
    small = numbers(4, 8, dtype=np.uint8)
    found = view_of(small, lambda t: t[:, 4:8].view("uint32"), ON_CHIP)
    np.testing.assert_array_equal(found, small[:, 4:8].view(np.uint32))
    refuses("view.dtype", small, lambda t: t[:, 2:6].view("uint32"), ON_CHIP)
    refuses("view.dtype", small, lambda t: t[:, 0:6].view("uint32"), ON_CHIP)
    refuses("view.dtype", numbers(4, 6, dtype=np.uint8), lambda t: t[:2, 0:4].view("uint32"), HBM)
    refuses(
        "view.dtype", numbers(4, 6, dtype=np.uint8), lambda t: t[:1, 0:4].view("uint32"), ON_CHIP
    )


@pytest.mark.parametrize(
    ("old", "new"), [("float16", "int16"), ("int32", "int16"), ("uint8", "int32")]
)
def test_exact_mode_keeps_no_bits_of_other_types(old: str, new: str) -> None:
    array = numbers(4, 8, dtype=old)
    for make in (lambda t: t.view(new), lambda t: t.ap([[8, 4], [1, 8]], dtype=new)):
        with pytest.raises(NkiError, match=r"view\.dtype"):
            view_of(array, make, ON_CHIP, exact=True)
        view_of(array, lambda t: t.view(old), ON_CHIP, exact=True)


@pytest.mark.parametrize(("old", "new"), [("float32", "int32"), ("int16", "uint16")])
def test_exact_mode_keeps_bits_that_are_whole(old: str, new: str) -> None:
    array = numbers(4, 8, dtype=old)
    found = view_of(array, lambda t: t[:, 1:].view(new), ON_CHIP, exact=True)
    np.testing.assert_array_equal(found, array[:, 1:].view(new))


# Access patterns.


def test_ap_adds_its_offset_to_that_of_the_view() -> None:
    inner = view_of(X, lambda t: t[2:, 1:].ap([[24, 2], [1, 3]], offset=2), ON_CHIP)
    np.testing.assert_array_equal(inner, X[2:4, 1, 2:5])
    kept = view_of(X, lambda t: t[2:, 1:].ap([[24, 2], [1, 3]]), HBM)
    np.testing.assert_array_equal(kept, X[2:4, 1, :3])


def test_ap_of_another_type_counts_its_elements() -> None:
    found = view_of(X, lambda t: t[1:].ap([[48, 3], [1, 5]], offset=1, dtype="int16"), ON_CHIP)
    np.testing.assert_array_equal(found, X.view(np.int16).reshape(8, 48)[1:4, 1:6])
    small = numbers(4, 8, dtype=np.uint8)
    refuses("view.dtype", small, lambda t: t[:, 2:].ap([[2, 4], [1, 1]], dtype="uint32"), ON_CHIP)


def test_get_pattern_gives_the_view_back() -> None:
    def make(t):
        view = t[2:6, ::2, 1:4]
        return view.ap(view.get_pattern())

    np.testing.assert_array_equal(view_of(X, make, ON_CHIP), X[2:6, ::2, 1:4])


@pytest.mark.parametrize(
    ("make", "on_chip", "expected"),
    [
        (lambda t: t, ON_CHIP, True),
        (lambda t: t[1:3], ON_CHIP, True),
        (lambda t: t[:, 1:3], ON_CHIP, True),
        (lambda t: t[:, 1:3], HBM, False),
        (lambda t: t[:, :, 1:3], ON_CHIP, False),
        (lambda t: t[1:3], HBM, True),
        (lambda t: t.permute((0, 2, 1)), HBM, False),
        (lambda t: t[:, :1].expand_dim(3), HBM, False),
        (lambda t: t[:, :1].expand_dim(3), ON_CHIP, True),
    ],
)
def test_is_contiguous(make: Callable[[Any], Any], on_chip: bool, expected: bool) -> None:
    found = []

    def kernel(x):
        found.append(make(nl.ndarray(x.shape, x.dtype) if on_chip else x).is_contiguous())

    run(kernel, X)
    assert found == [expected]
