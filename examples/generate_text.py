"""Text from a real language model (SmolLM2-135M-Instruct), token by token.

    python examples/generate_text.py                        the demo: a checked text and a chat
    python examples/generate_text.py --prompt "Once upon a time"
    python examples/generate_text.py --chat "Why is the sky blue?" --temperature 0.8

Needs the `models` extra; the model file (93 MB) is fetched on first use.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import jax_tkg
from jax_tkg.flax_layers import LlamaDecoder, decoder_from_gguf
from jax_tkg.generation import show
from jax_tkg.models import Tokenizer, read_gguf, smollm2_path

PROMPT = "The capital of France is"
CHAT = "Explain in two sentences why the sky is blue."
# The greedy continuation of PROMPT, the same from several other implementations of this model.
GREEDY_IDS = [7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34]
GREEDY_IDS += [32, 33, 40, 29, 32, 33, 29, 34, 34, 216]

PREFILL_CHUNK, STEPS_PER_CALL = 32, 4


class Writer:
    """A model, its tokenizer and a console to write on."""

    def __init__(self, console: Console, dtype: str) -> None:
        self.console, self.dtype = console, dtype
        with console.status("Reading the model"):
            gguf = read_gguf(smollm2_path())
            self.tokenizer = Tokenizer(gguf.tokenizer_metadata)
            self.model: LlamaDecoder = decoder_from_gguf(gguf, dtype=jnp.dtype(dtype))

    def write(
        self,
        text: str,
        max_new_tokens: int,
        selector: jax_tkg.TokenSelector,
        before: str | None = None,
    ) -> list[int]:
        """Continues a text on the console, shown after `before`; returns the new tokens."""
        prompt = self.tokenizer.encode(text)
        capacity = self.capacity(len(prompt) + max_new_tokens)

        def stream(count: int) -> Iterator[np.ndarray]:
            return jax_tkg.stream(
                self.model,
                [prompt],
                max_new_tokens=count,
                selector=selector,
                eos_ids=self.tokenizer.eos_ids,
                prefill_chunk=PREFILL_CHUNK,
                steps_per_call=STEPS_PER_CALL,
                capacity=capacity,
                cache_options={"dtype": self.dtype},
            )

        with self.console.status("Compiling"):
            begin = time.perf_counter()
            list(stream(2))  # one call of each program
            self.say(f"ready after {time.perf_counter() - begin:.1f} s of compilation")
        ids, _ = show(
            stream(max_new_tokens),
            self.tokenizer.stream().push,
            before=text if before is None else before,
            console=self.console,
        )
        return ids

    def capacity(self, tokens: int) -> int:
        """Room for that many tokens, rounded up: one compiled program for many lengths."""
        return -(-tokens // 256) * 256

    def explain(self) -> str:
        """Which implementation attends in a decode step."""
        attention = self.model.config.attention
        cache, *_ = self.model.init_caches(1, self.capacity(1), dtype=self.dtype)
        heads = (1, 1, attention.num_heads, attention.head_dim)
        return str(jax_tkg.explain(jax.ShapeDtypeStruct(heads, jnp.dtype(self.dtype)), cache))

    def say(self, line: str) -> None:
        """Prints a remark."""
        self.console.print(line, style="dim", markup=False, soft_wrap=True)


def demo(writer: Writer, options: argparse.Namespace) -> int:
    """A greedy text that must be the known one, then a chat; 1 if it is another."""
    writer.console.rule("Greedy")
    ids = writer.write(PROMPT, len(GREEDY_IDS), jax_tkg.Greedy())
    writer.say(f"token ids {ids}")
    if options.dtype != "float32":
        writer.say(f"not compared: the known ids are those of float32, not {options.dtype}")
    elif ids != GREEDY_IDS:
        writer.console.print(f"WRONG: the known ids are {GREEDY_IDS}", style="bold red")
        return 1
    else:
        writer.say("the same as the known ids")
    chat(writer, CHAT, options)
    return 0


def chat(writer: Writer, question: str, options: argparse.Namespace) -> None:
    """One question, one answer."""
    writer.console.rule("Chat")
    message = {"role": "user", "content": question}
    text = writer.tokenizer.apply_chat_template([message])
    chosen = selector(options.temperature, default=0.6)
    writer.write(text, options.max_new_tokens, chosen, before=f"> {question}\n\n")


def selector(temperature: float | None, default: float) -> jax_tkg.TokenSelector:
    """Greedy at temperature 0, else sampling from the more likely tokens."""
    temperature = default if temperature is None else temperature
    return jax_tkg.Sample(temperature, top_p=0.9) if temperature else jax_tkg.Greedy()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the arguments ask for."""
    parser = argparse.ArgumentParser(description="Text from SmolLM2-135M-Instruct.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", help="continue this text")
    what.add_argument("--chat", help="answer this question")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--temperature", type=float, help="0 is greedy, as --prompt is by default")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of weights, computation and KV cache",
    )
    options = parser.parse_args(arguments)

    writer = Writer(Console(highlight=False), options.dtype)
    status = 0
    if options.prompt is not None:
        writer.write(options.prompt, options.max_new_tokens, selector(options.temperature, 0.0))
    elif options.chat is not None:
        chat(writer, options.chat, options)
    else:
        status = demo(writer, options)
    writer.say(writer.explain())
    return status


if __name__ == "__main__":
    sys.exit(main())
