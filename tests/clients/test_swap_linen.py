"""The swap of linen modules, with the example of docs/swap.md as the client."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jax_tkg.flax_layers.swap import LinenCall, LinenSwap, SwapError, swap_linen
from jax_tkg.flax_layers.swap.linen_cache import ClientVariables, attend
from jax_tkg.flax_layers.swap.protocol import Client, numbers

PAGE = Path(__file__).parents[2] / "docs" / "swap.md"
HAS_TRACE_KEY = hasattr(jax, "make_user_context")


@pytest.fixture(scope="module")
def page() -> Any:
    """The page's program after it has run, as a module."""
    module = ModuleType("swap_page")
    sys.modules["swap_page"] = module
    with jax.numpy_dtype_promotion("standard"):
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
            exec(compile(block, PAGE.name, "exec"), module.__dict__)
    yield module
    del sys.modules["swap_page"]


@pytest.fixture(autouse=True)
def standard_promotion() -> Any:
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_the_example_swaps_and_agrees(page: Any) -> None:
    assert len(page.report) == 2
    assert [layer.path for layer in page.report] == ["layer_0", "layer_1"]
    assert "2 x layer_*: Attention, N=4 K=4 H=16, cache k BSKH [2, 512, 4, 16]" in str(page.report)
    assert "attention_tkg on cpu: xla" in str(page.report)
    np.testing.assert_allclose(page.after, page.before, rtol=0, atol=1e-5)
    assert page.updated["cache"]["layer_1"]["i"] == 101


def test_the_adapter_is_short() -> None:
    adapter = re.findall(r"```python\n(class MyAdapter.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(adapter[0].splitlines()) <= 40


def swap(page: Any, **options: Any) -> LinenSwap:
    return swap_linen([page.MyAdapter()], **options)


def fresh(page: Any) -> Any:
    """The page's step as a new function, which no version of JAX has traced before."""
    return lambda *args: page.step(*args)


def apply(page: Any, x: Any) -> Any:
    return page.model.apply({"params": page.params}, x, jnp.ones((2, 1), bool))


def test_nothing_called(page: Any) -> None:
    with pytest.raises(SwapError, match="no module ran"), swap(page):
        pass


def test_no_class_that_is_known(page: Any) -> None:
    said = r"What ran: Model, RMSNorm, Attention.*docs/swap\.md"
    with pytest.raises(SwapError, match=said), swap_linen():
        apply(page, page.x)


def test_another_number_of_layers(page: Any) -> None:
    with pytest.raises(SwapError, match="2 layers were swapped and 3 expected"):
        swap(page, layers=3)(lambda: apply(page, page.x))()


def test_an_error_inside_is_not_hidden(page: Any) -> None:
    with pytest.raises(ZeroDivisionError), swap(page):
        raise ZeroDivisionError


def test_a_function_jitted_before(page: Any) -> None:
    """Traced again inside the swap, or an error; and the swap does not outlive the context."""
    run = jax.jit(lambda x: apply(page, x))
    before = run(page.x)
    if not HAS_TRACE_KEY:
        with pytest.raises(SwapError, match="traced before"), swap(page):
            run(page.x)
        return
    again = swap(page, layers=2)
    with again as report:
        inside = run(page.x)
    assert len(report) == 2
    with again:  # found again: not traced a second time
        run(page.x)
    assert [len(layer.runs) for layer in report] == [1, 1]
    np.testing.assert_allclose(inside, before, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(run(page.x), before)


class Jitted(nn.Module):
    """One layer; with a class under `nn.jit`, as in Gemma, its traces outlive a call."""

    attention: Any

    @nn.compact
    def __call__(self, x: Any, pad_mask: Any) -> Any:
        return self.attention(name="layer")(x, pad_mask)


def test_a_layer_under_nn_jit(page: Any) -> None:
    model, mask = Jitted(nn.jit(page.Attention)), jnp.ones((2, 1), bool)
    variables = model.init(jax.random.key(0), page.x, mask)
    before = model.apply(variables, page.x, mask)
    if not HAS_TRACE_KEY:
        return
    with swap(page, layers=1):
        after = model.apply(variables, page.x, mask)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)


def test_a_layer_whose_trace_is_reused_is_an_error(
    page: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a JAX that knows no trace keys."""
    from contextlib import nullcontext

    from jax_tkg.flax_layers.swap import linen

    monkeypatch.setattr(linen, "_traced_for", lambda _: nullcontext())
    run = jax.jit(lambda x: apply(page, x))
    run(page.x)
    with pytest.raises(SwapError, match="no module ran"), swap(page):
        run(page.x)
    model, mask = Jitted(nn.jit(page.Attention)), jnp.ones((2, 1), bool)
    variables = model.init(jax.random.key(0), page.x, mask)
    model.apply(variables, page.x, mask)
    with pytest.raises(SwapError, match=r"What ran: Jitted.*traced before"), swap(page):
        model.apply(variables, page.x, mask)


def test_more_tokens_than_slots(page: Any) -> None:
    x = jnp.zeros((2, 513, 64))
    said = r"513 new tokens do not fit into the cache \(2, 512"
    with pytest.raises(SwapError, match=said), swap(page):
        jax.eval_shape(fresh(page), page.variables, x)


def test_an_implementation_by_name(page: Any) -> None:
    with swap(page, implementation="reference") as report:
        jax.eval_shape(fresh(page), page.variables, page.x)
    assert {layer.implementations for layer in report} == {("attention_tkg: reference",)}
    with pytest.raises(NotImplementedError, match="nki"):
        swap(page, implementation="nki")(jax.jit(fresh(page)))(page.variables, page.x)


class NoCache:
    """A module without variables."""

    def has_variable(self, *_: str) -> bool:
        return False


@pytest.mark.parametrize("tokens", [3, 18])  # decoded, and taken in as a prompt
def test_what_a_call_can_say(tokens: int) -> None:
    """Grouped heads, padding, a bias, a scale, a soft cap and a window, against NumPy."""
    rng = np.random.default_rng(0)
    query, key, value = (
        rng.standard_normal((2, tokens, heads, 8)).astype(np.float32) for heads in (6, 2, 2)
    )
    bias = rng.standard_normal((1, 6, 1, tokens)).astype(np.float32)
    seen = np.arange(tokens) >= np.array([[0], [2]])
    call = LinenCall(
        *map(jnp.asarray, (query, key, value)),
        key_mask=jnp.asarray(seen),
        bias=jnp.asarray(bias),
        scale=0.7,
        left_window=4,
        logits_soft_cap=2.0,
    )
    out, run = attend(call, ClientVariables().hold(NoCache(), call), None)
    key, value = (np.repeat(x.astype(np.float64), 3, axis=2) for x in (key, value))
    logits = 2.0 * np.tanh(0.7 * np.einsum("btnh,bsnh->bnts", query, key) / 2.0) + bias
    far = np.arange(tokens)[:, None] - np.arange(tokens)
    visible = (far >= 0) & (far <= 4) & seen[:, None, None]
    weights = np.where(visible, np.exp(logits), 0.0)
    total = weights.sum(-1, keepdims=True)
    weights = np.divide(weights, total, where=total > 0, out=np.zeros_like(weights))
    want = np.einsum("bnts,bsnh->btnh", weights, value)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-5)
    assert run.problem.op == ("attention_tkg" if tokens == 3 else "attention_cte")


@pytest.mark.parametrize(
    ("release", "read"), [("4.57.6", (4, 57, 6)), ("1.2rc1", (1, 2)), ("0.1.dev3", (0, 1))]
)
def test_versions(release: str, read: tuple[int, ...]) -> None:
    assert numbers(release) == read


@pytest.mark.parametrize(
    ("installed", "why"),
    [("4.57.0", False), ("4.57.9", False), ("4.56.2", True), ("4.58.0", True), (None, False)],
)
def test_tested_versions(monkeypatch: pytest.MonkeyPatch, installed: str | None, why: bool) -> None:
    monkeypatch.setattr(Client, "installed", lambda _: installed)
    assert (Client("transformers", ((4, 57), (4, 58))).why_untested() is not None) is why


def test_clients_are_not_imported() -> None:
    """Not by importing the swap; only what their users import is there."""
    import subprocess

    code = (
        "import sys; from jax_tkg.flax_layers.swap import swap_linen; "
        "print([m for m in ('transformers', 'tunix', 'gguf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
