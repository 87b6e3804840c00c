"""Loops that run on the device; the marks name what the checker must report."""

# ruff: noqa
import nki.isa as nisa
import nki.language as nl


def breaks_register_arithmetic(x, y, n):
    def body(i):
        nisa.dma_copy(dst=y, src=x[i * 2])  # breaks: register.arithmetic

    nl.fori_loop(0, n, body)


def keeps_register_arithmetic(x, y, n):
    def body(i):
        nisa.dma_copy(dst=y, src=x[i])

    nl.fori_loop(0, n, body, step=2)
    for i in range(4):
        nisa.dma_copy(dst=y, src=x[i * 2])


def copy(x, y, place):
    nisa.dma_copy(dst=y, src=x[place : place + 1])  # breaks: register.arithmetic


def breaks_register_arithmetic__2(x, y, n):
    for i in nl.dynamic_range(n):  # breaks: loop.deprecated
        j = i
        copy(x, y, place=j)


def keeps_register_arithmetic__2(x, y, n):
    for i in nl.dynamic_range(n):  # breaks: loop.deprecated
        j = 3
        copy(x, y, place=j)


def breaks_register_arithmetic__3(x, y):
    reg = nisa.register_alloc(3)
    while reg:  # breaks: loop.deprecated
        if reg > 1:  # breaks: register.arithmetic
            nisa.register_load(reg, x)


def keeps_register_arithmetic__3(x, y, reg=None):
    if reg == None:
        reg = nisa.register_alloc(3)
    while reg:  # breaks: loop.deprecated
        nisa.register_load(reg, x)


def breaks_register_arithmetic__4(x, y, n):
    for i in nl.dynamic_range(n):  # breaks: loop.deprecated

        def inner():
            return range(i)  # breaks: register.arithmetic

        inner()


def keeps_register_arithmetic__4(x, y, n):
    for i in nl.dynamic_range(n):  # breaks: loop.deprecated

        def inner():
            i = 4
            return range(i)

        inner()


def breaks_register_induction(x, n):
    def body(i):
        nisa.register_load(i, x)  # breaks: register.induction

    nl.fori_loop(0, n, body)


def keeps_register_induction(x, n):
    def body(r):
        nisa.register_load(r, x)
        return r

    nl.while_loop(n, body)


def breaks_loop_tensor_escapes(x, y, n):
    for i in nl.dynamic_range(n):  # breaks: loop.deprecated
        t = nl.ndarray((128, 8), dtype=x.dtype)
        view = t[0:64]
        nisa.dma_copy(dst=view, src=x)
    nisa.dma_copy(dst=y, src=view)  # breaks: loop.tensor-escapes


def keeps_loop_tensor_escapes(x, y, n):
    t = nl.ndarray((128, 8), dtype=x.dtype)
    for i in nl.dynamic_range(n):  # breaks: loop.deprecated
        view = t[0:64]
        nisa.dma_copy(dst=view, src=x)
    nisa.dma_copy(dst=y, src=view)


def breaks_loop_tensor_escapes__2(x, y, n):
    tiles = []

    def body(i):
        t = nl.ndarray((128, 8), dtype=x.dtype)
        tiles.append(t)

    nl.fori_loop(0, n, body)
    nisa.dma_copy(dst=y, src=tiles[0])  # breaks: loop.tensor-escapes


def keeps_loop_tensor_escapes__2(x, y, n):
    tiles = []

    def body(i):
        tiles = []
        t = nl.ndarray((128, 8), dtype=x.dtype)
        tiles.append(t)

    nl.fori_loop(0, n, body)
    t = nl.ndarray((128, 8), dtype=x.dtype)
    tiles.append(t)
    nisa.dma_copy(dst=y, src=tiles[0])


def breaks_loop_tensor_escapes__3(x, y, n):
    for i in nl.dynamic_range(n):  # breaks: loop.deprecated
        t = nl.ndarray((128, 8), dtype=x.dtype)
    t = t[0:64]  # breaks: loop.tensor-escapes


def keeps_loop_tensor_escapes__3(x, y, n):
    for i in nl.dynamic_range(n):  # breaks: loop.deprecated
        t = nl.ndarray((128, 8), dtype=x.dtype)
    t = nl.ndarray((128, 8), dtype=x.dtype)
    nisa.dma_copy(dst=y, src=t)


def breaks_loop_tensor_escapes__4(x, y, n, kept):
    def body(i):
        t = nl.ndarray((128, 8), dtype=x.dtype)
        kept.tile = t.reshape((128, 2, 4))

    nl.fori_loop(0, n, body)
    nisa.dma_copy(dst=y, src=kept.tile)  # breaks: loop.tensor-escapes


def keeps_loop_tensor_escapes__4(x, y, n, kept):
    def body(i):
        t = nl.ndarray((128, 8), dtype=x.dtype)
        kept.rows = t.shape[0]

    nl.fori_loop(0, n, body)
    nisa.dma_copy(dst=y, src=x[0 : kept.rows])


def breaks_loop_body_returns(x, n):
    def body(i):
        return x  # breaks: loop.body-returns

    nl.fori_loop(0, n, body)


def keeps_loop_body_returns(x, n):
    def body(i):
        return

    nl.fori_loop(0, n, body_fun=body)


def breaks_loop_condition(x, reg):
    def body(r):  # breaks: loop.condition
        nisa.register_load(r, x)

    nl.while_loop(reg, body)


def keeps_loop_condition(x, reg):
    def body(r):
        nisa.register_load(r, x)
        return r

    nl.while_loop(reg, body)


def breaks_loop_condition__2(x, reg):
    def body(r):
        return r, x  # breaks: loop.condition

    nl.while_loop(reg, body)


def keeps_loop_condition__2(x, reg):
    def body(r):
        return r

    nl.while_loop(reg, body_fun=body)


def body(i):
    print(i)


def breaks_loop_step(x, n):
    nl.fori_loop(0, n, body, step=-1)  # breaks: loop.step


def keeps_loop_step(x, n, step):
    nl.fori_loop(0, n, body, step=step)


def breaks_loop_no_reorder(x, n):
    with nl.no_reorder():
        nl.fori_loop(0, n, body)  # breaks: loop.no-reorder


def body_in_order(i):
    with nl.no_reorder():
        print(i)


def keeps_loop_no_reorder(x, n):
    nl.fori_loop(0, n, body_in_order)


def breaks_loop_deprecated(x, n):
    for i in nl.dynamic_range(n):  # breaks: loop.deprecated
        print(x)


def keeps_loop_deprecated(x, n):
    for i in nl.affine_range(4):
        print(x)


def breaks_loop_deprecated__2(x):
    reg = nisa.register_alloc(1)
    while reg:  # breaks: loop.deprecated
        nisa.register_load(reg, x)


def keeps_loop_deprecated__2(x):
    reg = 3
    while reg:
        reg = reg - 1
