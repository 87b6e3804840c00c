"""A jit-compiled generation loop of your own: `attention_tkg` and `KVCache`, no Flax, no file.

One attention layer with weights made by hand continues a text that repeats itself. A character's
key is made of the HISTORY characters before it, its value is the character, and the query is made
of the latest HISTORY characters: attention finds what followed them before (an "induction head").

    python examples/custom_loop.py
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jax_tkg

PROMPTS = [
    "tick tock, tick tock, ti",
    "the cat sat on the mat. the cat sat on the mat. the ca",
    "one two three four, one two three four, one",
]
NEW_CHARACTERS = 60
HISTORY, WIDTH, VOCAB = 8, 16, 128
CAPACITY = 4096
SHARPNESS = 40.0  # A key that matches but for one character gets exp(-40 * (1 - cosine)).


def embeddings() -> jax.Array:
    """Random directions `[VOCAB, WIDTH]`; character 0, which stands before the text, has none."""
    table = np.random.default_rng(0).standard_normal((VOCAB, WIDTH))
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    table[0] = 0
    return jnp.asarray(table, jnp.float32)


def histories(characters: np.ndarray) -> np.ndarray:
    """The HISTORY characters before each one, `[B, T, HISTORY]` of `[B, T]`."""
    padded = np.pad(characters, ((0, 0), (HISTORY, 0)))
    return np.stack([padded[:, i : i + characters.shape[1]] for i in range(HISTORY)], axis=2)


@partial(jax.jit, donate_argnames="cache")
def remember(
    embed: jax.Array,
    cache: jax_tkg.KVCache,
    before: jax.Array,
    characters: jax.Array,
    counts: jax.Array,
) -> jax_tkg.KVCache:
    """Appends the first `counts[b]` characters `[B, T]` of each row; one KV head."""
    batch, num_tokens = characters.shape
    key = embed[before].reshape(batch, num_tokens, 1, HISTORY * WIDTH)
    return cache.append(key, embed[characters][:, :, None], counts)


@partial(jax.jit, static_argnames="steps", donate_argnames="cache")
def continue_text(
    embed: jax.Array, cache: jax_tkg.KVCache, latest: jax.Array, *, steps: int
) -> tuple[jax.Array, jax_tkg.KVCache]:
    """Generates `steps` characters for each row, `[B, steps]`.

    `latest` are the last HISTORY + 1 characters of each row; the last one is not yet in the cache.
    The cache is donated and is the carry of the scan, so that it is updated in place.
    """
    batch = latest.shape[0]

    def step(carry, _):
        cache, latest = carry
        # Append first, then attend.
        before, newest = latest[:, :-1], latest[:, -1:]
        cache = remember(embed, cache, before[:, None], newest, jnp.ones(batch, jnp.int32))
        query = embed[latest[:, 1:]].reshape(batch, 1, 1, HISTORY * WIDTH)
        out = jax_tkg.attention_tkg(query, cache, scale=SHARPNESS)
        character = jax_tkg.argmax_tokens(out[:, 0, 0] @ embed.T)
        return (cache, jnp.concatenate([latest[:, 1:], character[:, None]], axis=1)), character

    (cache, _), characters = jax.lax.scan(step, (cache, latest), length=steps)
    return characters.T, cache


def by_lookup(text: str) -> str:
    """The same in plain Python, to check: what followed the latest characters before."""
    start = len(text)
    for _ in range(NEW_CHARACTERS):
        text += text[text.index(text[-HISTORY:]) + HISTORY]
    return text[start:]


def main() -> int:
    """Continues the prompts, all at once; 0 if the result is right."""
    lengths = np.array([len(text) for text in PROMPTS])
    characters = np.zeros((len(PROMPTS), lengths.max()), np.int32)
    for row, text in zip(characters, PROMPTS, strict=True):
        row[: len(text)] = list(text.encode("ascii"))
    latest = np.stack(
        [row[n - HISTORY - 1 : n] for row, n in zip(characters, lengths, strict=True)]
    )

    cache = jax_tkg.KVCache.create(
        len(PROMPTS),
        CAPACITY,
        num_kv_heads=1,
        head_dim=HISTORY * WIDTH,
        value_head_dim=WIDTH,
        dtype=jnp.bfloat16,
    )
    query = jax.ShapeDtypeStruct((len(PROMPTS), 1, 1, HISTORY * WIDTH), jnp.float32)
    print(jax_tkg.explain(query, cache, scale=SHARPNESS), end="\n\n")

    embed = embeddings()
    cache = remember(embed, cache, histories(characters), characters, lengths - 1)
    loop = continue_text.lower(embed, cache, latest, steps=NEW_CHARACTERS).compile()
    cache_bytes = sum(x.nbytes for x in jax.tree.leaves(cache))
    temporary = loop.memory_analysis().temp_size_in_bytes
    result, cache = loop(embed, cache, latest)

    right = True
    for text, row in zip(PROMPTS, np.asarray(result), strict=True):
        new = bytes(row.tolist()).decode("ascii")
        right &= new == by_lookup(text)
        print(f"{text}|{new}")
    print(f"\ncache {cache_bytes / 1e6:.1f} MB, temporary memory {temporary / 1e6:.2f} MB")
    print("as expected" if right else "NOT what a lookup in the text gives")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
