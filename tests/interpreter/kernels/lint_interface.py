"""Signatures, classes, outputs and arguments; the marks name what the checker must report."""

# ruff: noqa
from dataclasses import dataclass
from enum import Enum, IntEnum

import neuronxcc.nki.isa as old
import nki
import nki.isa as nisa
import nki.language as nl
from nki.language import NKIObject


class Mode(Enum):
    causal = 1
    full = 2


def breaks_language_keyword_only(x, *, scale=1.0):  # breaks: language.keyword-only
    return x


def keeps_language_keyword_only(x, scale=1.0):
    return x


def breaks_language_positional_only(x, /, scale=1.0):  # breaks: language.positional-only
    return x


def keeps_language_positional_only(x, scale=1.0):
    return x


def breaks_language_list_argument(x, strides=[1, 1]):  # breaks: language.list-argument
    return x


def keeps_language_list_argument(x, strides=(1, 1)):
    return x


def breaks_language_list_argument__2(
    x,
    axes: list[int] | None = None,  # breaks: language.list-argument
):
    return x


def keeps_language_list_argument__2(x, axes: tuple[list[int], ...] | None = None):
    return x


def breaks_language_star_arguments(x, *rest):  # breaks: language.star-arguments
    return x


def keeps_language_star_arguments(x, rest):
    return x


def breaks_language_star_arguments__2(x, shape):
    shape = (128, *shape)  # breaks: language.star-arguments
    y = nl.ndarray(shape, dtype=x.dtype, buffer=nl.shared_hbm)
    return y


def keeps_language_star_arguments__2(x, shape):
    y = nl.ndarray((128, shape[0], shape[1]), dtype=x.dtype, buffer=nl.shared_hbm)
    return y


def breaks_language_star_arguments__3(x, options):
    nisa.dma_copy(x, x, **options)  # breaks: language.star-arguments


def keeps_language_star_arguments__3(x, options):
    nisa.dma_copy(x, x, name=options["name"])


def twice(function):
    return function


@twice  # breaks: language.decorator
def helper(x):
    return x


def breaks_language_decorator(x):
    return helper(x)


@nki.jit(mode="trace")
def helper_2(x):
    return x


def keeps_language_decorator(x):
    return helper_2(x)


class Config:  # breaks: language.class-base
    n: int = 1


def breaks_language_class_base(x):
    return Config().n


@dataclass
class Config2(nl.NKIObject):
    n: int = 1


class Unused:
    pass


def keeps_language_class_base(x):
    return Config2().n


class Config3(NKIObject):
    n: int = 1


class Wide(Config3):  # breaks: language.class-base
    m: int = 2


def breaks_language_class_base__2(x, config: Wide):
    return config.n


class Wide2(NKIObject):
    n: int = 1
    m: int = 2


def keeps_language_class_base__2(x, config: Wide2):
    return config.n


class Level(IntEnum):  # breaks: language.class-base
    low = 1


def breaks_language_class_base__3(x):
    return Level.low


def keeps_language_class_base__3(x):
    return Mode.full


def breaks_language_output(x):
    y = nl.ndarray(x.shape, dtype=x.dtype)
    return x, y[0:64]  # breaks: language.output


def keeps_language_output(x):
    y = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    return x, y


def allocate(x):
    return nl.zeros(x.shape, x.dtype, nl.hbm)


def breaks_language_output__2(x):
    y = allocate(x)
    return [y.reshape((1, 128))]  # breaks: language.output


def allocate_2(x):
    return nl.zeros(x.shape, x.dtype, nl.shared_hbm)


def keeps_language_output__2(x):
    y = allocate_2(x)
    return [y.reshape((1, 128))]


def breaks_language_string_buffer(x):
    y = nl.ndarray(x.shape, x.dtype, buffer="sbuf")  # breaks: language.string-buffer


def keeps_language_string_buffer(x):
    y = nl.ndarray(x.shape, x.dtype, buffer=nl.sbuf)


def breaks_language_integer_enum(x, y):
    nisa.dma_copy(dst=x, src=y, dge_mode=2)  # breaks: language.integer-enum


def keeps_language_integer_enum(x, y):
    nisa.dma_copy(dst=x, src=y, dge_mode=nisa.dge_mode.hwdge)


def breaks_language_old_namespace(x, y):
    old.dma_copy(dst=x, src=y)  # breaks: language.old-namespace


def keeps_language_old_namespace(x, y):
    nisa.dma_copy(dst=x, src=y)
