"""The Flax decoders of transformers before and after the swap: same logits, same caches."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_tkg import neuron
from jax_tkg.flax_layers.swap import SwapWarning, rope_of_config, swap_linen
from jax_tkg.flax_layers.swap.protocol import Client
from tests.calls import quickly
from tests.clients import hf_models as hf
from tests.clients.hf_models import clients_promote_dtypes  # noqa: F401
from tests.hlo import cache_copies

CLOSE = 2e-5  # of logits of order 1, in float32


@pytest.mark.parametrize("name", hf.CLIENTS)
def test_a_left_padded_batch_decodes_the_same(name: str) -> None:
    client, prompts, mask = hf.make_client(name), hf.random_prompts(), hf.left_padded_mask()
    before = hf.decode(client, prompts, mask)
    with swap_linen(layers=hf.LAYERS) as report:
        after = hf.decode(client, prompts, mask)
    np.testing.assert_allclose(after.logits, before.logits, rtol=0, atol=CLOSE)
    assert after.ids == before.ids
    assert [layer.implementations for layer in report] == [
        ("attention_cte: xla", "attention_tkg: xla")
    ] * hf.LAYERS
    kv_heads = 6 if name == "gpt2" else 2
    assert {(x.num_heads, x.num_kv_heads, x.head_dim) for x in report} == {(6, kv_heads, 8)}
    same_cache(after.cache, before.cache, mask)
    # The padding would be noticed.
    unpadded = hf.decode(client, prompts, np.ones_like(mask), steps=0)
    assert np.abs(unpadded.logits[0, 1] - before.logits[0, 1]).max() > 0.1


def same_cache(after: Any, before: Any, mask: np.ndarray) -> None:
    """Same names, shapes and dtypes, and at the real tokens the same keys and values."""
    assert jax.tree.structure(after) == jax.tree.structure(before)
    used = mask[:, : hf.PROMPT + hf.STEPS].astype(bool)
    for mine, other in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        if mine.ndim == 4:
            mine, other = (np.asarray(x)[:, : used.shape[1]][used] for x in (mine, other))
        np.testing.assert_allclose(mine, other, rtol=0, atol=CLOSE)


def test_a_mask_with_holes_is_kept() -> None:
    client, prompts, mask = hf.make_client("llama"), hf.random_prompts(), hf.left_padded_mask()
    holed = mask.copy()
    holed[0, 4:6] = holed[1, 17] = 0
    before = hf.decode(client, prompts, holed, steps=1)
    with swap_linen():
        after = hf.decode(client, prompts, holed, steps=1)
    np.testing.assert_allclose(after.logits, before.logits, rtol=0, atol=CLOSE)
    assert np.abs(hf.decode(client, prompts, mask, 0).logits - before.logits[:1]).max() > 0.1


def test_without_a_cache_and_through_the_wrapper() -> None:
    client, ids = hf.make_client("mistral"), hf.random_prompts()
    mask = hf.left_padded_mask(hf.PROMPT)

    def full(params: Any) -> Any:
        return client(ids, attention_mask=mask, params=params).logits

    before = np.asarray(quickly(full)(client.params))
    swap = swap_linen(layers=hf.LAYERS)
    after = np.asarray(quickly(swap(full))(client.params))
    real = mask.astype(bool)
    np.testing.assert_allclose(after[real], before[real], rtol=0, atol=CLOSE)
    assert {layer.cache for layer in swap.report} == {"none"}


def test_the_caches_are_made_inside_the_swap_too() -> None:
    client = hf.make_client("gpt2")
    want = jax.eval_shape(lambda: client.init_cache(2, 24))
    with swap_linen(layers=hf.LAYERS):
        got = quickly(lambda: client.init_cache(2, 24))()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(
        lambda x: (x.shape, x.dtype), want
    )
    assert not any(np.any(x) for x in jax.tree.leaves(got))


def test_bfloat16() -> None:
    client = hf.make_client("llama", jnp.bfloat16)
    prompts, mask = hf.random_prompts(), hf.left_padded_mask()
    exact = hf.decode(hf.make_client("llama"), prompts, mask, steps=0)
    before = hf.decode(client, prompts, mask, steps=0)
    with swap_linen(layers=hf.LAYERS) as report:
        after = hf.decode(client, prompts, mask, steps=0)
    assert "bfloat16" in str(report)
    assert {x.dtype for x in jax.tree.leaves(after.cache)} == {
        np.dtype(jnp.bfloat16),
        np.dtype(np.int32),
    }
    budget = 2 * np.abs(before.logits - exact.logits).max()
    assert 0 < np.abs(after.logits - exact.logits).max() <= budget


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_decode_step_copies_no_cache(dtype: Any) -> None:
    slots = 4096
    client = hf.make_client("llama", dtype, max_position_embeddings=slots, hidden_size=384)
    cache = hf.empty_cache(client, 2, slots)
    arguments = (
        client.params,
        cache,
        np.ones((2, 1), np.int32),
        hf.left_padded_mask(slots),
        np.full((2, 1), 9, np.int32),
    )
    with swap_linen(layers=hf.LAYERS):
        swapped = hf.make_step(client).lower(*arguments).compile()
    reasons = cache_copies(swapped, cache)
    if dtype == jnp.bfloat16:
        # XLA:CPU writes a whole bfloat16 array for an update, into itself: see `write_at`. The
        # client rounds its float32 weights in every step: they are the temporary memory.
        assert [x for x in reasons if "temporary" not in x] == ["bitcast-convert"]
    else:
        assert reasons == []
        plain = hf.make_step(client).lower(*arguments).compile()
        assert "temporary" in " ".join(cache_copies(plain, cache))


def test_a_decode_step_can_run_on_neuron() -> None:
    client = hf.make_client("llama")
    cache = hf.empty_cache(client, 2, hf.SLOTS)

    def step(params: Any, cache: Any, ids: Any, mask: Any, positions: Any) -> Any:
        return hf.make_step(client)(params, cache, ids, mask, positions)

    one = jnp.ones((2, 1), jnp.int32)
    mask = jnp.asarray(hf.left_padded_mask())
    with swap_linen(layers=hf.LAYERS):
        found = neuron.check(step, client.params, cache, one, mask, one)
    assert [x for x in found if x.severity == "error"] == []


@pytest.mark.slow  # the client compiles its prefill op by op
def test_the_clients_own_generate() -> None:
    client, prompts = hf.make_client("llama"), hf.random_prompts()
    mask = hf.left_padded_mask(hf.PROMPT)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    before = client.generate(prompts, attention_mask=mask, **options).sequences
    with swap_linen(layers=hf.LAYERS):
        after = client.generate(prompts, attention_mask=mask, **options).sequences
    np.testing.assert_array_equal(after, before)


def test_cross_attention_is_left_alone_and_reported() -> None:
    client = hf.make_client("gpt2", add_cross_attention=True)
    ids, encoded = hf.random_prompts(), jnp.ones((2, 3, 48))

    def full(params: Any) -> Any:
        return client(ids, encoder_hidden_states=encoded, params=params).logits

    before = np.asarray(quickly(full)(client.params))
    with swap_linen(layers=hf.LAYERS) as report:
        after = np.asarray(quickly(full)(client.params))
    np.testing.assert_allclose(after, before, rtol=0, atol=CLOSE)
    assert [x.path for x in report.left_alone] == [
        f"transformer/h/{i}/crossattention" for i in range(hf.LAYERS)
    ]
    assert "left alone" in str(report)


@pytest.mark.parametrize(
    ("name", "options", "needs"),
    [
        ("llama", {"output_attentions": True}, "needs the weights"),
        ("gpt2", {"train": True, "dropout_rng": jax.random.key(0)}, "train=False"),
    ],
)
def test_what_it_cannot_do_is_refused(name: str, options: dict[str, Any], needs: str) -> None:
    client = hf.make_client(name)
    with pytest.raises(NotImplementedError, match=needs), swap_linen():
        jax.eval_shape(lambda: client(hf.random_prompts(), **options).logits)


def trace(client: Any) -> Any:
    return jax.eval_shape(lambda: client(hf.random_prompts()).logits)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("llama", {"rope_theta": 5e5}, "ignores its config's rope_theta=500000"),
        ("mistral", {"sliding_window": None}, "lets every token see only itself"),
    ],
)
def test_what_the_client_gets_wrong_is_said_once(
    name: str, change: dict[str, Any], said: str
) -> None:
    client = hf.make_client(name, **change)
    with pytest.warns(SwapWarning, match=said) as caught, swap_linen() as report:
        trace(client)
    assert len(caught) == 1
    assert said in str(report)


def test_another_version_of_the_client_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    client = hf.make_client("llama")
    with swap_linen() as report:
        trace(client)
    assert report.adapters == [f"hf_llama of transformers {hf.transformers.__version__}"]
    monkeypatch.setattr(Client, "installed", lambda _: "4.58.1")
    with (
        pytest.warns(SwapWarning, match=r"4\.58\.1 is not one of the versions tested"),
        swap_linen(),
    ):
        trace(client)


def test_the_rotation_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    client = hf.make_client("llama", rope_theta=500.0)
    ids = hf.random_prompts()

    def full(params: Any) -> Any:
        return client(ids, params=params).logits

    unheeding = np.asarray(quickly(full)(client.params))
    with rope_of_config():
        ours = np.asarray(quickly(full)(client.params))
        with warnings.catch_warnings(), swap_linen():  # and the swap has nothing to say
            warnings.simplefilter("error")
            swapped = np.asarray(quickly(full)(client.params))
    home = hf.transformers.models.llama.modeling_flax_llama

    def table(length: int, width: int) -> Any:
        angles = np.outer(np.arange(length), 500.0 ** (-np.arange(0, width, 2) / width))
        twice = np.concatenate([angles, angles], axis=-1)[:, None]
        return jnp.asarray(np.concatenate([np.sin(twice), np.cos(twice)], axis=-1), jnp.float32)

    monkeypatch.setattr(home, "create_sinusoidal_positions", table)
    want = np.asarray(quickly(lambda params: full(params))(client.params))
    np.testing.assert_allclose(ours, want, rtol=0, atol=CLOSE)
    np.testing.assert_allclose(swapped, want, rtol=0, atol=CLOSE)
    assert np.abs(unheeding - want).max() > 0.1
