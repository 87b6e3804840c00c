"""The layers as their definition says: one sequence at a time, no cache, all scores at once.

`np` is NumPy for float64 results, or `jax.numpy` to differentiate. Nothing of jax_tkg computes
here; parameters are nested dicts, as in the modules.
"""

import dataclasses
import math

import jax
import numpy

from jax_tkg.flax_layers import AttentionConfig, DecoderConfig


def rms_norm(x, scale, eps, np=numpy):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def linear(x, parameters):
    return x @ parameters["kernel"] + parameters.get("bias", 0)


def rotate(x, rope, np=numpy):
    """`[L, heads, H]` at positions 0 to L - 1, pairs (i, i + R) or (2i, 2i + 1) of the first 2R."""
    width = x.shape[-1] if rope.rotary_dim is None else rope.rotary_dim
    pairs = numpy.arange(width // 2)
    angle = numpy.outer(numpy.arange(len(x)), rope.base ** (-2.0 * pairs / width))[:, None]
    cos, sin = numpy.cos(angle).astype(x.dtype), numpy.sin(angle).astype(x.dtype)
    first, second = (2 * pairs, 2 * pairs + 1) if rope.interleaved else (pairs, pairs + width // 2)
    a, b = x[..., first], x[..., second]
    turned = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    order = numpy.argsort(numpy.concatenate([first, second]))
    return np.concatenate([turned[..., order], x[..., width:]], -1)


def attention(config: AttentionConfig, parameters, x, np=numpy):
    """`[L, D]` to `[L, D]`."""
    length, group = len(x), config.num_heads // config.num_kv_heads
    query = linear(x, parameters["q"]).reshape(length, config.num_heads, -1)
    key = linear(x, parameters["k"]).reshape(length, config.num_kv_heads, -1)
    value = linear(x, parameters["v"]).reshape(length, config.num_kv_heads, -1)
    if config.qk_norm_eps is not None:
        query = rms_norm(query, parameters["q_norm"]["scale"], config.qk_norm_eps, np)
        key = rms_norm(key, parameters["k_norm"]["scale"], config.qk_norm_eps, np)
    if config.rope is not None:
        query, key = rotate(query, config.rope, np), rotate(key, config.rope, np)
    scale = 1 / math.sqrt(config.head_dim) if config.scale is None else config.scale
    behind = numpy.arange(length)[:, None] - numpy.arange(length)
    seen = (behind >= 0) & (behind < (config.sliding_window or length))
    mixed = []
    for head in range(config.num_heads):
        logits = query[:, head] @ key[:, head // group].T * scale
        if config.logits_soft_cap is not None:
            logits = config.logits_soft_cap * np.tanh(logits / config.logits_soft_cap)
        weights = np.exp(np.where(seen, logits, -numpy.inf))
        total = weights.sum(-1, keepdims=True)
        if config.use_sinks:
            total = total + np.exp(parameters["sinks"][head])
        mixed.append(weights / total @ value[:, head // group])
    return linear(np.concatenate(mixed, -1), parameters["out"])


def decoder(config: DecoderConfig, parameters, tokens):
    """`[L]` token ids to logits `[L, V]`, in float64."""
    x = parameters["embedding"][tokens]
    for i in range(config.num_layers):
        p, window = parameters["layers"][i], config.layer_windows
        layer = config.attention
        if window is not None:
            layer = dataclasses.replace(layer, sliding_window=window[i])
        normed = rms_norm(x, p["attention_norm"]["scale"], config.norm_eps)
        x = x + attention(layer, p["attention"], normed)
        normed = rms_norm(x, p["mlp_norm"]["scale"], config.norm_eps)
        gate = linear(normed, p["gate"])
        x = x + linear(gate / (1 + numpy.exp(-gate)) * linear(normed, p["up"]), p["down"])
    head = parameters["embedding" if config.tie_embeddings else "lm_head"]
    return rms_norm(x, parameters["final_norm"]["scale"], config.norm_eps) @ head.T


def random_like(tree, seed=0, spread=0.5):
    """Random values in the shapes and dtypes of a tree of parameters: no bias or sink stays 0."""
    leaves, treedef = jax.tree.flatten(tree)
    rng = numpy.random.default_rng(seed)
    values = [spread * rng.standard_normal(leaf.shape) for leaf in leaves]
    return treedef.unflatten(
        [jax.numpy.asarray(v, leaf.dtype) for v, leaf in zip(values, leaves, strict=True)]
    )


def float64(tree):
    return jax.tree.map(lambda leaf: numpy.asarray(leaf, numpy.float64), tree)
