"""How two programs may share a problem, as data: what is split, what is exchanged when, who stores.

Pure Python; for plans that say in words what they do, and for the documentation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax_tkg.nki.plan import KernelPlan

STATE = ("maximum", "sum", "output")
"""What there is of every row: running maximum, running sum, running output."""


@dataclass(frozen=True)
class Sharing:
    """One way for two programs to share a problem.

    Attributes:
        name: of it.
        split: what data each program has.
        on_tile: parts of the state that are exchanged on every tile, in order.
        at_end: those exchanged once at the end.
        maximum, total, products: over whose keys the running maximum, the running sum and the
            running output are while tiles are folded.
        combine: what is computed of what was exchanged at the end.
        stores: who writes which rows of the results to HBM.
        in_sbuf: what is exchanged besides where both programs need all results in SBUF.
    """

    name: str
    split: str
    on_tile: tuple[str, ...]
    at_end: tuple[str, ...]
    maximum: str
    total: str
    products: str
    combine: str
    stores: str
    in_sbuf: tuple[str, ...] = ()


OWN, BOTH = "own keys", "both programs' keys"

SHARINGS: Mapping[str, Sharing] = MappingProxyType(
    {
        sharing.name: sharing
        for sharing in (
            Sharing(
                name="batch",
                split="each program has its own sequences, or KV heads of a single one",
                on_tile=(),
                at_end=(),
                maximum=OWN,
                total=OWN,
                products=OWN,
                combine="nothing",
                stores="each program its own rows",
                in_sbuf=("output", "log-sum-exp"),
            ),
            Sharing(
                name="sequence, deferred",
                split="each program has its own keys and values of every sequence",
                on_tile=(),
                at_end=STATE,
                maximum=OWN,
                total=OWN,
                products=OWN,
                combine="both rescale by exp(own maximum - larger maximum), and add",
                stores="the programs take turns, both having all rows",
            ),
            Sharing(
                name="sequence, every tile",
                split="each program has its own keys and values of every sequence",
                on_tile=("maximum", "sum"),
                at_end=("output",),
                maximum=BOTH,
                total=BOTH,
                products=OWN,
                combine="both add the outputs, which have one maximum",
                stores="the programs take turns, both having all rows",
            ),
            Sharing(
                name="same",
                split="nothing: both programs have all",
                on_tile=(),
                at_end=(),
                maximum=OWN,
                total=OWN,
                products=OWN,
                combine="nothing",
                stores="the programs take turns, both having all rows",
            ),
            Sharing(
                name="none",
                split="nothing: there is one program",
                on_tile=(),
                at_end=(),
                maximum=OWN,
                total=OWN,
                products=OWN,
                combine="nothing",
                stores="the program all rows",
            ),
        )
    }
)
"""Every way that a plan may choose, by name."""


def sharing_of(plan: "KernelPlan") -> Sharing:
    """The way that a plan chose."""
    of_keys = plan.sharding == "sequence"
    return SHARINGS[f"sequence, {plan.exchange}" if of_keys else plan.sharding]


ASPECTS: tuple[tuple[str, str], ...] = (
    ("data split", "split"),
    ("exchanged on every tile", "on_tile"),
    ("running maximum", "maximum"),
    ("running sum", "total"),
    ("running output", "products"),
    ("exchanged at the end", "at_end"),
    ("final combination", "combine"),
    ("who stores", "stores"),
    ("exchanged for results in SBUF", "in_sbuf"),
)
"""The rows of the table: a title, and the attribute of `Sharing`."""


def markdown() -> str:
    """The differences as a table, a column for each way in which two programs share work."""
    names = ("batch", "sequence, deferred", "sequence, every tile")
    rows = [("", *names), ("---",) * (len(names) + 1)]
    for title, attribute in ASPECTS:
        values = [getattr(SHARINGS[name], attribute) for name in names]
        cells = [v if isinstance(v, str) else ", ".join(v) or "nothing" for v in values]
        rows.append((title, *cells))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
