"""Launching kernels: `jit`, `run`, `installed`, arguments and outputs, errors, threads."""

import concurrent.futures
import functools
import importlib
import sys
import threading
import traceback
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

from jax_tkg.nki import interpreter
from jax_tkg.nki.interpreter import isa as nisa
from jax_tkg.nki.interpreter import language as nl
from tests.interpreter.launches import filled, loaded, refusal, some, stored


def double(x: Any) -> Any:
    tile = loaded(x)
    for _ in range(1):
        copy = nl.ndarray(tile.shape, tile.dtype)
        nisa.tensor_copy(copy, tile)
    output = nl.ndarray((2, *x.shape), x.dtype, nl.shared_hbm)
    nisa.dma_copy(output[0], tile)
    nisa.dma_copy(output[1], copy)
    return output


X = some(4, 6)
TWICE = np.stack([X, X])


# jit.


@pytest.mark.parametrize(
    "make",
    [
        interpreter.jit,
        interpreter.jit(platform_target="trn2"),
        interpreter.jit(),
        lambda f: interpreter.jit(interpreter.jit(f)),
        lambda f: interpreter.jit(f)[1],
        lambda f: interpreter.jit(f)[(1,)],
    ],
)
def test_forms_of_jit(make: Any) -> None:
    kernel = make(double)
    assert kernel.__name__ == "double"
    np.testing.assert_array_equal(kernel(X), TWICE)
    np.testing.assert_array_equal(interpreter.run(kernel, X).outputs, TWICE)


def programs(x: Any) -> Any:
    output = nl.ndarray((nl.num_programs(), *x.shape), x.dtype, nl.shared_hbm)
    nisa.dma_copy(output[nl.program_id()], loaded(x))
    return output


def test_programs_of_a_launch() -> None:
    kernel = interpreter.jit(programs)
    assert kernel(X).shape[0] == 1
    assert kernel[2](X).shape[0] == 2
    assert interpreter.run(kernel[2], X).outputs.shape[0] == 2
    assert len(interpreter.run(kernel[2], X, programs=1).programs) == 1
    assert len(interpreter.run(programs, X, programs=2).programs) == 2
    assert kernel(X).shape[0] == 1, "kernel[2] changed the kernel"
    for wrong in (0, 3, (2, 2), "2"):
        with pytest.raises(ValueError, match="1 or 2 programs"):
            kernel[wrong]


def test_a_kernel_called_by_a_kernel_is_a_function() -> None:
    inner = interpreter.jit(stored)

    def outer(x: Any) -> Any:
        return inner(loaded(x))

    run = interpreter.run(outer, X)
    np.testing.assert_array_equal(run.outputs, X)
    assert len(run.programs[0]) == 2
    np.testing.assert_array_equal(
        interpreter.run(interpreter.jit(outer)[2], X, programs=1).outputs, X
    )


def test_a_kernel_does_not_launch() -> None:
    def outer(x: Any) -> Any:
        return interpreter.run(double, x)

    assert "double" in str(refusal("launch.nested", outer, X))
    np.testing.assert_array_equal(interpreter.run(double, X).outputs, TWICE)


def test_instructions_need_a_kernel() -> None:
    with pytest.raises(RuntimeError, match="inside a kernel"):
        nl.ndarray((2, 2), nl.float32)


def test_there_is_one_launch_axis() -> None:
    interpreter.run(lambda: nl.program_id(axis=0))
    refusal("program_id.axis", lambda: nl.program_id(axis=1))


def test_targets() -> None:
    for name in ("trn1", "trn2", "trn3", "gen3", interpreter.TARGETS["trn2"]):
        interpreter.run(double, X, target=name)
    with pytest.raises(ValueError, match=r"trn9.*trn1, trn2, trn3"):
        interpreter.run(double, X, target="trn9")


# Arguments and outputs.


def test_keywords_and_defaults() -> None:
    def kernel(x: Any, *, scale: float = 2.0, **more: Any) -> Any:
        assert type(scale) is float
        return stored(loaded(more.get("other", x))), scale

    output, scale = interpreter.run(kernel, x=X).outputs
    np.testing.assert_array_equal(output, X)
    assert scale == 2
    output, scale = interpreter.run(kernel, X, scale=np.float32(0.5), other=2 * X).outputs
    np.testing.assert_array_equal(output, 2 * X)
    assert scale == 0.5


class Pair(NamedTuple):
    first: Any
    second: Any


class Config(nl.NKIObject):
    def __init__(self, table: Any, size: int) -> None:
        self.table, self.size = table, size


def test_arrays_inside_of_arguments() -> None:
    def kernel(pair: Any, both: Any, config: Any, named: Any) -> Any:
        assert isinstance(pair, Pair)
        assert config.size == 3
        outputs = [stored(loaded(x)) for x in (*pair, both[1], config.table, named["x"])]
        return Pair(tuple(outputs), {"second": outputs[1]})

    arrays = [some(2, 3, seed=i) for i in range(5)]
    config = Config(arrays[3], 3)
    run = interpreter.run(kernel, Pair(*arrays[:2]), (1, arrays[2]), config, {"x": arrays[4]})
    assert isinstance(run.outputs, Pair)
    for got, want in zip(run.outputs.first, arrays, strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(run.outputs.second["second"], arrays[1])
    assert config.table is arrays[3]


def test_lists_are_no_arguments() -> None:
    def kernel(arrays: Any) -> Any:
        return stored(loaded(arrays[0]))

    interpreter.run(kernel, (X,))
    error = refusal("language.list-argument", kernel, [X])
    assert "tuple" in str(error)
    assert error.sources[0].function == "kernel"


def test_other_callables() -> None:
    class Callable:
        def __call__(self, x: Any) -> Any:
            return double(x)

    for kernel in (functools.partial(lambda n, x: double(x), 3), Callable()):
        np.testing.assert_array_equal(interpreter.run(kernel, X).outputs, TWICE)
    with pytest.raises(interpreter.NkiError):
        interpreter.run(functools.partial(double), [X])


def test_types_numpy_has_and_nki_has_not() -> None:
    with pytest.raises(TypeError, match="float64"):
        interpreter.run(double, X.astype(np.float64))


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2, np.int8, np.uint32]
)
@pytest.mark.parametrize("exact", [False, True])
def test_types_come_back(dtype: Any, exact: bool) -> None:
    x = some(4, 6, dtype=dtype)
    got = interpreter.run(double, x, exact=exact).outputs
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(got[1].astype(np.float32), x.astype(np.float32))


def test_arguments_may_lie_anyhow() -> None:
    x = some(6, 8)[::-1, ::2].T
    np.testing.assert_array_equal(interpreter.run(double, x).outputs[0], x)


def fill(x: Any) -> Any:
    nisa.dma_copy(x[1:2], filled((1, x.shape[1]), x.dtype))
    return x


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8])
@pytest.mark.parametrize("nested", [False, True])
def test_arguments_written_in_place(nested: bool, dtype: Any, exact: bool) -> None:
    x = some(4, 6, dtype=dtype)
    want = x.copy()
    want[1] = 1
    strided = np.zeros((4, 12), dtype)
    strided[:, ::2] = x
    for array in (x, strided[:, ::2]):
        if nested:
            run = interpreter.run(lambda both: fill(both[0]), (array, 2), exact=exact)
        else:
            run = interpreter.run(fill, array, exact=exact)
        np.testing.assert_array_equal(array.astype(np.float32), want.astype(np.float32))
        np.testing.assert_array_equal(run.outputs.astype(np.float32), want.astype(np.float32))
        assert not np.shares_memory(run.outputs, array)
        (after,) = run.arguments.values()
        np.testing.assert_array_equal(after.astype(np.float32), want.astype(np.float32))


def test_arguments_that_cannot_be_written_stay() -> None:
    x = some(4, 6)
    x.flags.writeable = False
    before = x.copy()
    run = interpreter.run(fill, x)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(run.arguments["x"][1], np.ones(6))


def test_a_refused_kernel_leaves_its_arguments() -> None:
    def kernel(x: Any) -> None:
        fill(x)
        nisa.dma_copy(x, x[:2])

    x = some(4, 6)
    before = x.copy()
    refusal("dma_copy.size", kernel, x)
    np.testing.assert_array_equal(x, before)


# What is shown.


def test_prints() -> None:
    lines = list[str]()

    def kernel(x: Any) -> None:
        nl.device_print("the tile", loaded(x)[:, :2])

    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    interpreter.run(kernel, x, print=lines.append)
    (line,) = lines
    assert "[program 0] the tile" in line
    assert "[2, 2] float32" in line
    assert "4. 5." in line


def test_device_print_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    interpreter.run(lambda x: nl.device_print("prefix", x), X)
    assert "prefix" in capsys.readouterr().out


def test_capture() -> None:
    def kernel(x: Any) -> None:
        for name in ("first", "second"):
            tile = nl.ndarray(x.shape, x.dtype, name=name)
            nisa.dma_copy(tile, x)
            nisa.memset(tile[:, :1], 0.0)

    x = some(4, 6)
    cleared = x.copy()
    cleared[:, 0] = 0
    captured = interpreter.run(kernel, x, capture=["second"]).captured
    assert [(c.core, c.name, c.instruction.op) for c in captured] == [
        (0, "second", "dma_copy"),
        (0, "second", "memset"),
    ]
    np.testing.assert_array_equal(captured[0].values, x)
    np.testing.assert_array_equal(captured[1].values, cleared)
    assert len(interpreter.run(kernel, x, capture="*").captured) == 4
    assert not interpreter.run(kernel, x).captured


# Errors.


class MistakeError(Exception):
    """Something a kernel raises."""


@pytest.mark.parametrize("launched", [1, 2])
def test_the_kernels_errors_are_the_callers(launched: int) -> None:
    mistake = MistakeError("of the kernel")

    def helper() -> None:
        raise mistake

    def kernel() -> None:
        helper()

    with pytest.raises(MistakeError) as caught:
        interpreter.run(kernel, programs=launched)
    assert caught.value is mistake
    assert mistake.__cause__ is None
    assert [frame.name for frame in traceback.extract_tb(mistake.__traceback__)][-2:] == [
        "kernel",
        "helper",
    ]


@pytest.mark.parametrize("launched", [1, 2])
def test_a_refusal_names_the_kernels_line(launched: int) -> None:
    def helper(tile: Any) -> None:
        nisa.tensor_copy(tile, tile[:2])

    def kernel() -> None:
        helper(filled((4, 4)))

    error = refusal("tensor_copy.shape", kernel, programs=launched)
    (source,) = error.sources
    assert source.file == __file__
    assert (source.line, source.function) == (helper.__code__.co_firstlineno + 1, "helper")
    assert str(error).startswith(f"test_launch.py:{source.line} in helper: tensor_copy: ")
    assert str(error).endswith("[tensor_copy.shape]")


def test_a_refusal_in_a_loop_names_the_body() -> None:
    def body(i: Any) -> None:
        nisa.memset(nl.ndarray((2, 2), nl.uint8), 256)

    error = refusal("memset.range", lambda: nl.fori_loop(0, 2, body))
    assert error.sources[0].function == "body"


def test_missing_instructions_have_a_name() -> None:
    with pytest.raises(NotImplementedError, match=r"nki\.isa\.no_such_thing"):
        _ = nisa.no_such_thing
    with pytest.raises(AttributeError):
        _ = nisa._no_such_thing


# Several Python threads.


def test_threads_are_independent() -> None:
    barrier = threading.Barrier(4)

    def kernel(x: Any) -> Any:
        barrier.wait(10)
        tile = nl.ndarray(x.shape[1:], x.dtype, address=(0, 0), name="tile")
        nisa.dma_copy(tile, x[nl.program_id()])
        received = nl.ndarray(x.shape[1:], x.dtype)
        other = 1 - nl.program_id()
        nisa.sendrecv(tile, received, other, other, 0)
        output = nl.ndarray(x.shape, x.dtype, nl.shared_hbm)
        nisa.dma_copy(output[nl.program_id()], received)
        return output

    def launch(i: int) -> bool:
        x = some(2, 4, 6, seed=i)
        got = interpreter.run(kernel, x, programs=2, seed=None).outputs
        return bool((got == x[::-1]).all())

    # Four launches reach the barrier with one program each: none of them may wait for another.
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(launch, range(4)))


# `import nki`.

SOURCE = """
import nki
import nki.isa as nisa
import nki.language as nl
from nki.language import shared_hbm


@nki.jit
def kernel(x):
    tile = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x)
    output = nl.ndarray(x.shape, dtype=x.dtype, buffer=shared_hbm)
    nisa.dma_copy(dst=output, src=tile)
    return output
"""


def names_of_nki() -> set[str]:
    return {name for name in sys.modules if name.split(".")[0] == "nki"}


def test_import_nki(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels_of_a_user.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    assert not names_of_nki()
    with interpreter.installed():
        module = importlib.import_module("kernels_of_a_user")
        assert importlib.util.find_spec("nki") is not None
        with interpreter.installed():
            import nki  # type: ignore[import-not-found,unused-ignore]

            assert nki.jit is interpreter.jit
        assert "nki" in sys.modules
    monkeypatch.delitem(sys.modules, "kernels_of_a_user")
    assert not names_of_nki()
    np.testing.assert_array_equal(module.kernel(X), X)


def test_what_nki_names() -> None:
    with interpreter.installed():
        import nki

        np.testing.assert_array_equal(nki.simulate(double)(X), TWICE)
        with pytest.raises(NotImplementedError, match=r"nki\.collectives\.all_reduce"):
            _ = nki.collectives.all_reduce
        assert not hasattr(nki.collectives, "__wrapped__")


def test_nki_goes_when_the_block_fails() -> None:
    with pytest.raises(MistakeError), interpreter.installed():
        raise MistakeError
    assert not names_of_nki()


@pytest.mark.parametrize("imported", [False, True])
def test_the_real_package(imported: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "nki"
    package.mkdir()
    (package / "__init__.py").write_text("real = True\n")
    (package / "isa.py").write_text("real = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    real = importlib.import_module("nki.isa") if imported else None
    try:
        with pytest.raises(RuntimeError, match="over_real=True"), interpreter.installed():
            pass
        with interpreter.installed(over_real=True):
            assert importlib.import_module("nki.isa") is nisa
        assert sys.modules.get("nki.isa") is real
        assert importlib.import_module("nki").real
    finally:
        for name in names_of_nki():
            del sys.modules[name]
