"""Statements; the marks name what the checker must report."""

# ruff: noqa
import math

import nki
import nki.language as nl
from nki.language import NKIObject

SCALES = {"a": 1.0}
SEEN = []


def breaks_language_import(x):
    import math  # breaks: language.import


def keeps_language_import(x):
    math.ceil(0.5)


def breaks_language_nested_class(x):
    class State(NKIObject):  # breaks: language.nested-class
        pass


class State(NKIObject):
    pass


def keeps_language_nested_class(x):
    return State()


async def helper(x):  # breaks: language.async
    return x


def breaks_language_async(x):
    return helper(x)


def helper_2(x):
    return x


def keeps_language_async(x):
    return helper_2(x)


def tiles(x):
    yield x  # breaks: language.yield


def breaks_language_yield(x):
    for tile in tiles(x):
        print(tile)


def tiles_2(x):
    return [x]


def keeps_language_yield(x):
    for tile in tiles_2(x):
        print(tile)


def breaks_language_match(x, n):
    match n:  # breaks: language.match
        case 1:
            return x


def keeps_language_match(x, n):
    if n == 1:
        return x


def breaks_language_del(x, options):
    del options["a"]  # breaks: language.del


def keeps_language_del(x, options):
    options.pop("a")


def breaks_language_global(x):
    global SEEN  # breaks: language.global


def keeps_language_global(x):
    print(SEEN)


def breaks_language_global__2(x):
    SEEN.append(x)  # breaks: language.global


def keeps_language_global__2(x):
    SEEN = []
    SEEN.append(x)


def breaks_language_global__3(x):
    SCALES["b"] = 2.0  # breaks: language.global


def keeps_language_global__3(x):
    def inner(scales):
        scales["b"] = SCALES["a"]


def breaks_language_with(x):
    with nki.scope("x"):  # breaks: language.with
        print(x)


def keeps_language_with(x):
    with nl.no_reorder():
        print(x)


def breaks_language_try(x):
    try:  # breaks: language.try
        print(x)
    finally:
        print(x)


def keeps_language_try(x):
    print(x)


def breaks_language_raise(x):
    if x.shape[0] > 128:
        raise ValueError  # breaks: language.raise


def keeps_language_raise(x):
    assert x.shape[0] <= 128, "too large"


def breaks_language_loop_else(x):
    for i in range(4):
        if i == 3:
            break
    else:
        print(x)  # breaks: language.loop-else


def keeps_language_loop_else(x):
    for i in range(4):
        if i == 3:
            break
