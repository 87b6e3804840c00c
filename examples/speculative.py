"""Speculative decoding with a real model (SmolLM2-135M-Instruct): several tokens a step, same text.

    python examples/speculative.py
    python examples/speculative.py --max-tokens 8 --new-tokens 200
    python examples/speculative.py --adaptive

The model writes a given letter again to someone else, so that most of what comes next stands in its
prompt: drafts are looked up there, without a second model. The text is written both ways in one
run, must be the same, and both are timed, in turns. `--adaptive` drafts while that pays, by what a
step of either way takes here. Needs the `models` extra; the model file (93 MB) is fetched on first
use.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp

import jax_tkg
from jax_tkg.flax_layers import decoder_from_gguf
from jax_tkg.generation import Adaptive, Generated, PromptLookup, step_times
from jax_tkg.models import Tokenizer, read_gguf, smollm2_path

TEXT = """\
Dear Ms Lind,

thank you for your order of 12 March. The two oak chairs will leave our workshop in Visby on Monday
and should reach you by Thursday. Please check that both boxes are sealed before you sign for them.

Kind regards,
Anna Berg
"""
PROMPT = f"Original letter:\n\n{TEXT}\nThe same letter, sent again to Mr Holm:\n\nDear Mr Holm,"


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the text both ways; fails if they differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-tokens", type=int, default=4, help="drafts a step (default: 4)")
    parser.add_argument("--ngram", type=int, default=3, help="tokens compared (default: 3)")
    parser.add_argument("--adaptive", action="store_true", help="pause where drafts do not pay")
    parser.add_argument("--new-tokens", type=int, default=80, help="the most to write")
    parser.add_argument("--repeat", type=int, default=2, help="how often both are timed")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args(argv)

    gguf = read_gguf(smollm2_path())
    tokenizer = Tokenizer(gguf.tokenizer_metadata)
    model = decoder_from_gguf(gguf, dtype=jnp.dtype(args.dtype))
    prompt = tokenizer.encode(PROMPT)
    options = {"steps_per_call": 4, "cache_options": {"dtype": args.dtype}}
    plain = partial(
        jax_tkg.generate,
        model,
        [prompt],
        max_new_tokens=args.new_tokens,
        eos_ids=tokenizer.eos_ids,
        **options,
    )
    lookup = PromptLookup(max_tokens=args.max_tokens, ngram=args.ngram)
    speculate: Adaptive | PromptLookup = lookup
    if args.adaptive:
        times = step_times(model, [prompt], lookup, **options)
        print(times, end="\n\n")
        speculate = Adaptive(lookup, break_even=times.break_even)
    ways = {"plain": plain, "speculative": partial(plain, speculate=speculate)}
    results = {name: generate() for name, generate in ways.items()}  # compiles
    seconds: dict[str, float] = dict.fromkeys(ways, float("inf"))
    for _ in range(args.repeat):
        for name, generate in ways.items():
            seconds[name] = min(seconds[name], timed(generate))

    print(PROMPT + tokenizer.decode(results["plain"].rows()[0]))
    same = results["plain"].rows() == results["speculative"].rows()
    print("\nthe speculative text is", "the same" if same else "NOT the same:")
    if not same:
        print(tokenizer.decode(results["speculative"].rows()[0]))
    print(results["speculative"].acceptance)
    tokens = int(results["plain"].lengths[0])
    for name, taken in seconds.items():
        print(f"{name}: {tokens} tokens in {taken:.2f} s, {tokens / taken:.1f} tokens/s")
    print(f"{seconds['plain'] / seconds['speculative']:.2f} times as fast, prompt included")
    return 0 if same else 1


def timed(generate: "partial[Generated]") -> float:
    """Seconds of one call; the results are on the host when it returns."""
    begin = time.perf_counter()
    generate()
    return time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(main())
