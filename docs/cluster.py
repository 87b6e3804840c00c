"""What the time model says of one attention layer on 1 to 64 logical cores: `make docs`.

Prints the table of docs/sharding.md and writes it there, and draws docs/figures/cluster.svg. Pure
arithmetic on plans and on the constants of the interpreter's time model; nothing is measured.
"""

from dataclasses import dataclass
from pathlib import Path

from jax_tkg.nki.describe import exchanges_of
from jax_tkg.nki.interpreter.hardware import TRN2
from jax_tkg.nki.interpreter.report.constants import CONSTANTS, run_efficiency
from jax_tkg.nki.plan import Features, KernelPlan, make_plan

PAGE = Path(__file__).parent / "sharding.md"
FIGURE = Path(__file__).parent / "figures" / "cluster.svg"
START, END = "<!-- table of docs/cluster.py -->", "<!-- end of the table -->"

CORES = (1, 2, 4, 8, 16, 32, 64)
TOKENS = tuple(2**n for n in (13, 15, 17, 19, 20))

HEADS, KV_HEADS, HEAD_DIM, ITEM_BYTES = 64, 8, 128, 2
"""One layer of a model of 70 billion parameters: GQA of groups of 8, bfloat16."""

HOP_US = 2.0
"""[collectives] per hop of a collective inside a server: "1-2 us"; the larger is taken."""

MERGE_COLLECTIVES, HOPS = 2, 2
"""Merging parts: a maximum, then a sum. An all-reduce of the mesh algorithm has two steps."""

LINK_GBPS = 1280 / 4
"""[trn2] 1.28 TB/s a chip, [assumed] shared equally by its four logical cores."""

FLOAT_BYTES, PARTITIONS, PROGRAMS = 4, 128, 2


@dataclass(frozen=True)
class Step:
    """One token of one sequence, one layer, in microseconds.

    Attributes:
        cores: logical ones of two physical cores.
        heads, keys: parts into which KV heads and slots are split.
        dma: loading keys and values, of the program that has more.
        exchange: between the two programs of a logical core.
        collective: between logical cores that share a head.
    """

    cores: int
    heads: int
    keys: int
    dma: float
    exchange: float
    collective: float

    @property
    def total(self) -> float:
        """The three after each other."""
        return self.dma + self.exchange + self.collective

    def __str__(self) -> str:
        """The total and its parts."""
        parts = (self.dma, self.exchange, self.collective)
        return f"**{self.total:.1f}** = " + " + ".join(f"{x:.1f}" for x in parts)


def split_of(cores: int) -> tuple[int, int]:
    """Parts of heads and of keys: heads first, they need no communication."""
    heads = min(cores, KV_HEADS)
    return heads, cores // heads


def plan_of(cores: int, tokens: int) -> KernelPlan:
    """The kernel's plan of one core's part, all of whose slots are live."""
    heads, keys = split_of(cores)
    return make_plan(
        batch=1,
        tokens=1,
        slots=tokens // keys,
        heads=HEADS // heads,
        kv_heads=KV_HEADS // heads,
        head_dim=HEAD_DIM,
        value_head_dim=HEAD_DIM,
        layout="BKHS",
        features=Features(scale=HEAD_DIM**-0.5),
        programs=PROGRAMS,
    )


def dma_us(plan: KernelPlan) -> float:
    """Both programs at once: each tile's bytes at the rate of its contiguous runs."""
    rate = min(TRN2.dma_gbps, TRN2.hbm_gbps)
    times = []
    for share in plan.shares:
        pairs = sum(group.pairs for block in share.blocks for group in block.groups)
        total = CONSTANTS["dma_start"].value
        for tile in share.tiles:
            columns = tile.cached[0].subtiles
            row_bytes = HEAD_DIM * ITEM_BYTES
            efficiency = run_efficiency(columns * row_bytes)
            total += pairs * tile.keys * 2 * row_bytes / (rate * efficiency)
        times.append(total)
    return max(times) / 1000


def exchange_us(plan: KernelPlan) -> float:
    """Exchanges of [128, rows] float32, one after the other."""
    rows = sum(block.rows for block in plan.shares[0].blocks)
    start = CONSTANTS["gpsimd_dma_start"].value
    semaphore = CONSTANTS["semaphore"].value / TRN2.gpsimd_ghz
    moved = PARTITIONS * rows * FLOAT_BYTES / CONSTANTS["gpsimd_dma"].value
    return exchanges_of(plan) * (start + semaphore + moved) / 1000


def collective_us(cores: int) -> float:
    """Maximum, then output and sum, of the rows of a core's heads."""
    heads, keys = split_of(cores)
    if keys == 1:
        return 0.0
    rows = HEADS // heads
    sent = rows * (HEAD_DIM + 2) * FLOAT_BYTES * (keys - 1)
    return MERGE_COLLECTIVES * HOPS * HOP_US + sent / LINK_GBPS / 1000


def step_of(cores: int, tokens: int) -> Step:
    """What the model says of so many logical cores and tokens."""
    plan = plan_of(cores, tokens)
    return Step(cores, *split_of(cores), dma_us(plan), exchange_us(plan), collective_us(cores))


def name_of(tokens: int) -> str:
    """As 8k or 1M."""
    return f"{tokens // 2**20}M" if tokens >= 2**20 else f"{tokens // 2**10}k"


def table() -> str:
    """Markdown: cores by tokens, microseconds."""
    rows = [
        ("logical cores", "heads x keys", *(f"{name_of(n)} tokens" for n in TOKENS)),
        ("---",) * (2 + len(TOKENS)),
    ]
    for cores in CORES:
        heads, keys = split_of(cores)
        steps = (str(step_of(cores, n)) for n in TOKENS)
        rows.append((str(cores), f"{heads} x {keys}", *steps))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def table_in(page: str) -> str:
    """The table that a page has now."""
    return page.split(START)[1].split(END)[0].strip()


def draw(path: Path) -> None:
    """Microseconds over cores, a line for each number of tokens, and what is not DMA."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "jax_tkg"  # the same drawing gives the same file
    import matplotlib.pyplot as plt

    fig, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
    for tokens in TOKENS:
        steps = [step_of(cores, tokens) for cores in CORES]
        (line,) = axis.plot(
            CORES, [s.total for s in steps], "o-", label=f"{name_of(tokens)} tokens"
        )
        axis.plot(CORES, [s.dma for s in steps], ":", color=line.get_color())
    axis.set(xscale="log", yscale="log", xlabel="logical cores", ylabel="modelled microseconds")
    axis.set_xticks(CORES, [str(n) for n in CORES])
    axis.set_title("One layer, one token: total, and DMA alone (dotted)", loc="left", fontsize=10)
    axis.axvspan(KV_HEADS * 1.4, CORES[-1] * 1.1, color="#e9ecef", zorder=0)
    axis.text(KV_HEADS * 1.5, axis.get_ylim()[0] * 1.3, "keys are split too", fontsize=8)
    axis.legend(fontsize=8)
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)


def main() -> None:
    """Prints the table, writes it into the page, draws the figure."""
    print(table())
    page = PAGE.read_text()
    PAGE.write_text(page.replace(table_in(page), table()))
    draw(FIGURE)


if __name__ == "__main__":
    main()
