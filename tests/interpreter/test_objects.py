"""Classes of kernels: NKIObject makes of them what the compiler does."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from jax_tkg.nki.interpreter.language import NKIObject


@dataclass
class Sizes(NKIObject):
    rows: int
    tiled: bool = False
    tiles: list[int] = field(default_factory=list)

    def toggle(self) -> None:
        self.tiled = not self.tiled


class Plain(NKIObject):
    offset = None  # no annotation: a field all the same
    count = 3

    def __post_init__(self) -> None:
        self.next = self.count + 1


@dataclass
class WithoutAnnotations(NKIObject):
    first = None
    second = 2


@dataclass
class Wider(Sizes):
    columns: int = 5


class OwnInit(NKIObject):
    def __init__(self, value: Any) -> None:
        self.value = value


class InheritsInit(OwnInit):
    extra: int = 1


def test_a_dataclass_is_one() -> None:
    sizes = Sizes(4, tiles=[1])
    sizes.toggle()
    assert (sizes.rows, sizes.tiled, sizes.tiles) == (4, True, [1])
    assert Sizes(1).tiles is not Sizes(1).tiles
    assert Sizes(2) == Sizes(2)
    assert repr(Sizes(2)).endswith("Sizes(rows=2, tiled=False, tiles=[])")


def test_fields_without_default_are_none() -> None:
    assert Sizes().rows is None  # type: ignore[call-arg]


def test_fields_need_neither_decorator_nor_annotation() -> None:
    plain = Plain(offset=7)  # type: ignore[call-arg]
    assert (plain.offset, plain.count, plain.next) == (7, 3, 4)
    assert WithoutAnnotations(second=5).second == 5  # type: ignore[call-arg]


def test_fields_of_bases_come_first() -> None:
    wider = Wider(1, True, [], 9)
    assert (wider.rows, wider.tiled, wider.columns) == (1, True, 9)


def test_an_init_of_ones_own_stays_also_for_subclasses() -> None:
    assert OwnInit(3).value == 3
    assert InheritsInit(4).value == 4


@pytest.mark.parametrize(
    ("args", "kwargs"), [((1, 2, 3, 4), {}), ((1,), {"rows": 2}), ((), {"colour": 1})]
)
def test_wrong_fields_are_refused(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="has the fields rows, tiled, tiles"):
        Sizes(*args, **kwargs)
