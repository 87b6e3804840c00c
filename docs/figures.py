"""Draws the figures of the documentation from the code itself: `make docs`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

import jax_tkg
from jax_tkg.attention import prepare
from jax_tkg.implementations import IMPLEMENTATIONS
from jax_tkg.online.plan import OnlinePlan, make_plan
from jax_tkg.online.rows import TileRanges
from jax_tkg.online.tiles import MaskTiles

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "jax_tkg"  # the same drawing gives the same file
FIGURES = Path(__file__).parent / "figures"
COLOURS = {"full": "#2a6f97", "edge": "#f4a259", "skipped": "#e9ecef"}


def tile_kinds(
    lengths: list[int], window: tuple[int, int] | None, slots: int
) -> tuple[OnlinePlan, np.ndarray]:
    """What the ROWS form does with each tile of each row: 2 full, 1 masked, 0 skipped."""
    batch = len(lengths)
    query = jnp.zeros((batch, 4, 8, 128))
    cache = jnp.zeros((batch, slots, 8, 128), jnp.bfloat16)
    problem, ops = prepare(
        query,
        cache,
        cache,
        key_value_seq_lengths=jnp.asarray(lengths),
        local_window_size=window,
    )
    plan = make_plan(problem, jax_tkg.Target(("cpu",)))
    masks = MaskTiles.create(problem, ops)
    ranges = TileRanges.create(masks, masks.cached, plan.tile)
    kinds = np.zeros((batch, plan.num_tiles), int)
    for b in range(batch):
        kinds[b, int(ranges.first[b]) : int(ranges.end[b])] = 1
        kinds[b, int(ranges.full_first[b]) : int(ranges.full_end[b])] = 2
    return plan, kinds


def draw_tiles(path: Path) -> None:
    """Tiles read for a ragged batch, without and with a sliding window."""
    lengths, slots = [8192, 3000, 1030, 70, 0], 8192
    fig, axes = plt.subplots(2, 1, figsize=(9, 4.2), layout="constrained")
    for axis, window in zip(axes, (None, (1023, 0)), strict=True):
        plan, kinds = tile_kinds(lengths, window, slots)
        for b, row in enumerate(kinds):
            for i, kind in enumerate(row):
                colour = COLOURS[("skipped", "edge", "full")[kind]]
                axis.add_patch(Rectangle((i, -b), 0.92, 0.8, color=colour))
        read = (kinds > 0).sum() / kinds.size
        title = "no window" if window is None else f"window of {window[0] + 1} keys"
        axis.set_title(f"T = 4, {title}: {read:.0%} of the bucket is read", loc="left", fontsize=10)
        axis.set(xlim=(0, plan.num_tiles), ylim=(-len(lengths) + 0.9, 0.9))
        axis.set_yticks([0.4 - b for b in range(len(lengths))], [f"length {n}" for n in lengths])
        axis.set_xticks([])
        axis.spines[:].set_visible(False)
    axes[1].set_xlabel(f"tiles of {plan.tile} keys, slots 0 to {slots}")
    handles = [Rectangle((0, 0), 1, 1, color=c) for c in COLOURS.values()]
    fig.legend(
        handles, ["no mask needed", "masked", "not read"], loc="outside lower right", ncols=3
    )
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)


def draw_flow(path: Path) -> None:
    """From the public call to the result, with the registered implementations."""
    boxes = [
        ("attention_tkg", "attention.py"),
        ("Operands +\nAttentionProblem", "operands.py, problem.py"),
        ("primitive", "primitive.py:\nvmap, vjp, lowering"),
        ("choose, plan", "implementations.py,\nonline/plan.py"),
        (" | ".join(IMPLEMENTATIONS), "online/, reference.py"),
        ("out, lse", "[B,T,N,Hv], [B,T,N]"),
    ]
    fig, axis = plt.subplots(figsize=(11, 1.7))
    for i, (name, where) in enumerate(boxes):
        box = FancyBboxPatch(
            (i * 2, 0), 1.5, 1, boxstyle="round,pad=0.08", fc="#eef4f8", ec="#2a6f97"
        )
        axis.add_patch(box)
        axis.text(i * 2 + 0.75, 0.66, name, ha="center", va="center", fontsize=9, weight="bold")
        axis.text(i * 2 + 0.75, 0.2, where, ha="center", va="center", fontsize=7)
        if i:
            start, end = (i * 2 - 0.4, 0.5), (i * 2 - 0.1, 0.5)
            axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12))
    axis.set(xlim=(-0.2, 2 * len(boxes) - 0.2), ylim=(-0.2, 1.2))
    axis.axis("off")
    fig.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    plt.close(fig)


def main() -> None:
    """Writes docs/figures/*.svg."""
    jax.config.update("jax_platforms", "cpu")
    FIGURES.mkdir(exist_ok=True)
    draw_flow(FIGURES / "flow.svg")
    draw_tiles(FIGURES / "tiles.svg")
    print(*sorted(p.name for p in FIGURES.iterdir()))


if __name__ == "__main__":
    main()
