"""Expressions; the marks name what the checker must report."""

# ruff: noqa
import math
from enum import Enum

import numpy as np
import nki.isa as nisa
import nki.language as nl


class Mode(Enum):
    causal = 1
    full = 2


SCALES = {"a": 1.0}
KNOWN = ["a", "b"]


def breaks_language_is(x, flag):
    if flag is not True:  # breaks: language.is
        return x


def keeps_language_is(x, flag):
    if flag != True:
        return x


def breaks_language_is_none(x, mask=None):
    if mask is None:  # breaks: language.is-none
        return x


def keeps_language_is_none(x, mask=None):
    if mask == None:
        return x


def breaks_language_enum_operator(x, mode):
    if mode < Mode.full:  # breaks: language.enum-operator
        return x


def keeps_language_enum_operator(x, mode):
    if mode == Mode.full or mode in (Mode.causal, Mode.full) or mode.value < 2:
        return x


def breaks_language_enum_operator__2(x, mode: Mode):
    code = mode | 4  # breaks: language.enum-operator
    return x


def keeps_language_enum_operator__2(x, mode: Mode):
    code = mode.value | 4
    return x


def breaks_language_membership(x, name):
    if name in SCALES:  # breaks: language.membership
        return x


def keeps_language_membership(x, name):
    if name in ("a", "b") or name in KNOWN or "a" in name:
        return x


def breaks_language_membership__2(x, mode):
    known = {}
    known["a"] = 1
    if "a" in known:  # breaks: language.membership
        return x


def keeps_language_membership__2(x, mode):
    known = []
    known.append("a")
    if "a" in known:
        return x


def breaks_language_membership__3(x, mode):
    if mode not in Mode:  # breaks: language.membership
        return x


def keeps_language_membership__3(x, mode):
    if mode not in (Mode.causal, Mode.full):
        return x


def breaks_language_value(x):
    seed = 1 << 3
    seed = 8589934592  # breaks: language.value


def keeps_language_value(x):
    seed = 1 << 3
    seed = 4294967295


def breaks_language_value__2(x):
    name = b"x"  # breaks: language.value


def keeps_language_value__2(x):
    name = "x"


def breaks_language_dict_key(x):
    tiles = {0: x}  # breaks: language.dict-key


def keeps_language_dict_key(x):
    key = "1"
    tiles = {"0": x, key: x}


def breaks_language_set(x):
    done = set()  # breaks: language.set


def keeps_language_set(x):
    done = list()


def breaks_language_set__2(x):
    done = {1, 2}  # breaks: language.set


def keeps_language_set__2(x):
    done = (1, 2)


def breaks_language_fstring_format(x, i):
    print(f"tile {i:03d}")  # breaks: language.fstring-format


def keeps_language_fstring_format(x, i):
    print(f"tile {i} of {x.shape=}")


def breaks_language_comprehension(x):
    tiles = [x[i] for i in range(4)]  # breaks: language.comprehension


def keeps_language_comprehension(x):
    tiles = []
    for i in range(4):
        tiles.append(x[i])


def breaks_language_generator(x):
    shape = tuple(n // 2 for n in x.shape)  # breaks: language.generator


def keeps_language_generator(x):
    shape = tuple(x.shape)


def breaks_language_lambda(x):
    half = lambda n: n // 2  # breaks: language.lambda


def keeps_language_lambda(x):
    def half(n):
        return n // 2


def breaks_language_walrus(x):
    if (n := x.shape[0]) > 128:  # breaks: language.walrus
        return x


def keeps_language_walrus(x):
    n = x.shape[0]
    if n > 128:
        return x


def breaks_language_builtin(x):
    for i, n in enumerate(x.shape):  # breaks: language.builtin
        print(i, n)


def keeps_language_builtin(x):
    for i in range(len(x.shape)):
        print(i, x.shape[i])


def breaks_language_builtin__2(x):
    return sum(x.shape)  # breaks: language.builtin


def keeps_language_builtin__2(x):
    def sum(values):
        return values[0] + values[1]

    return sum(x.shape)


def breaks_language_library(x):
    n = np.prod(x.shape)  # breaks: language.library


def keeps_language_library(x):
    n = math.ceil(x.shape[0] / 128)
