"""Several prompts served together by SmolLM2-135M-Instruct, each with settings of its own.

    python examples/serve_paged.py
    python examples/serve_paged.py --max-new-tokens 100 --pages 24 --rows 2
    python examples/serve_paged.py --drafts 4

More requests than rows: some wait until others have finished. Two begin alike and share the pages
of that. With few pages (`--pages`), the youngest give way and are computed again later. One is
cancelled half way. With `--drafts`, several tokens a step are looked up in the texts so far and
verified, as long as that pays: the same texts in fewer steps. Needs the `models` extra; the model
file (93 MB) is fetched on first use.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import jax.numpy as jnp
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jax_tkg.flax_layers import decoder_from_gguf
from jax_tkg.generation import Adaptive, PromptLookup
from jax_tkg.models import Tokenizer, read_gguf, smollm2_path
from jax_tkg.serving import Engine, NewToken, Request, SamplingSettings, ServingConfig, Ticket

# The greedy continuation of the first prompt, the same from several other implementations.
KNOWN_IDS = [7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34]

COOK = "You are a cook with thirty years of experience in small kitchens. You say: to make bread,"
PROMPTS = [
    ("The capital of France is", "greedy", SamplingSettings(), ()),
    ("Once upon a time", "T=0.8, top-p 0.9", SamplingSettings(0.8, top_p=0.9, seed=1), ()),
    ("Once upon a time", "another seed", SamplingSettings(0.8, top_p=0.9, seed=2), ()),
    ("def fibonacci(n):\n", "ends at a blank line", SamplingSettings(), ("\n\n",)),
    (COOK + " you", "greedy", SamplingSettings(), ()),
    (COOK + " never", "T=0.7, min-p 0.1", SamplingSettings(0.7, min_p=0.1, seed=3), ()),
]
CANCELLED = 2


def view(engine: Engine, tickets: Sequence[Ticket], seconds: float) -> Group:
    """What there is so far."""
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(no_wrap=True, style="dim")
    table.add_column()
    for ticket, (prompt, settings, _, _) in zip(tickets, PROMPTS, strict=True):
        done = ticket.completion
        new = "".join(event.text for event in ticket.events if isinstance(event, NewToken))
        state = ticket.state.value if done is None else done.reason.value
        if ticket.shared_tokens:
            state += f", {ticket.shared_tokens} tokens shared"
        begin = prompt if len(prompt) < 40 else "... " + prompt[prompt.index("You say") :]
        table.add_row(f"{state}\n{settings}", Text(begin, style="bold") + Text(new))
    made = sum(len(ticket.tokens) for ticket in tickets)
    speed = f"{made} tokens, {made / seconds:.1f} tokens/s"
    queue = f"{engine.num_running} running, {engine.num_waiting} waiting"
    return Group(table, Text(f"{queue}; {engine.usage}; {speed}", style="dim"))


def serve(console: Console, engine: Engine, tickets: Sequence[Ticket]) -> float:
    """Runs to the end, shown while it happens if this is a terminal; how long it took."""
    begin = time.perf_counter()
    most = engine.usage
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while engine.num_running or engine.num_waiting:
            engine.step()
            most = max(most, engine.usage, key=lambda usage: usage.used)
            doomed = tickets[CANCELLED]
            if len(doomed.tokens) > doomed.request.max_new_tokens // 2:
                engine.cancel(doomed)
            if console.is_terminal:
                live.update(view(engine, tickets, time.perf_counter() - begin), refresh=True)
    console.print(f"at most: {most}", style="dim")
    return time.perf_counter() - begin


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves the prompts; 0 if the first, greedy one gets the known ids and no page is lost."""
    parser = argparse.ArgumentParser(description="Continuous batching with SmolLM2-135M.")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--rows", type=int, default=4, help="requests that decode together")
    parser.add_argument("--pages", type=int, help="pages of 16 tokens, by default enough for all")
    parser.add_argument("--drafts", type=int, default=0, help="tokens drafted a step, 0 for none")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args(arguments)

    console = Console(highlight=False)
    with console.status("Reading the model"):
        gguf = read_gguf(smollm2_path())
        tokenizer = Tokenizer(gguf.tokenizer_metadata)
        model = decoder_from_gguf(gguf, dtype=jnp.dtype(options.dtype))
    longest = max(len(tokenizer.encode(prompt)) for prompt, *_ in PROMPTS)
    config = ServingConfig(
        max_rows=options.rows,
        page_len=16,
        pages_per_sequence=-(-(longest + options.max_new_tokens) // 16),
        num_pages=options.pages,
        steps_per_call=4,
        prefill_chunk=32,
        speculate=Adaptive(PromptLookup(options.drafts)) if options.drafts else None,
    )
    cache_options = {"dtype": options.dtype}
    engine = Engine(model, config, decoder=tokenizer.stream, cache_options=cache_options)
    with console.status("Compiling"):
        begin = time.perf_counter()
        engine.warm_up()
    console.print(f"ready after {time.perf_counter() - begin:.1f} s of compilation", style="dim")

    tickets = [
        engine.submit(
            Request(
                tokenizer.encode(prompt),
                options.max_new_tokens,
                sampling=sampling,
                stop=stop,
                eos_ids=tokenizer.eos_ids,
            )
        )
        for prompt, _, sampling, stop in PROMPTS
    ]
    seconds = serve(console, engine, tickets)
    console.print(view(engine, tickets, seconds))
    if options.drafts:
        console.print(str(engine.speculation), style="dim")

    first, known = tickets[0].tokens, KNOWN_IDS[: options.max_new_tokens]
    if options.dtype == "float32" and first[: len(known)] != known:
        console.print(f"WRONG: {first} does not begin with the known ids {known}", style="red")
        return 1
    if engine.usage.used:
        console.print(f"LOST: {engine.usage}", style="red")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
