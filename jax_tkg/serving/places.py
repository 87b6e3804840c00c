"""Where requests can be: the rows of the batch and the pages, all together or by parts of a mesh.

A mesh that splits the rows splits the pages with them: a row uses pages of its own part only, so
that no device needs what another one has. Each part has a pool of its own here, of pages that are
numbered over all parts as the compiled steps number them. Without a mesh there is one part.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from jax_tkg.serving.config import ServingConfig
from jax_tkg.serving.pool import PagePool, PageUsage
from jax_tkg.serving.request import State, Ticket
from jax_tkg.serving.rows import Row


@dataclass
class _Part:
    """Consecutive rows of the batch, and the pages that they can use.

    Attributes:
        slots: the rows.
        pool: the pages.
        promised: pages that requests may need which cannot be put back.
    """

    slots: range
    pool: PagePool
    promised: int = 0


class Places:
    """The rows and the pages of an engine.

    Attributes:
        rows: requests in rows, by slot.
    """

    def __init__(self, config: ServingConfig, num_parts: int = 1) -> None:
        """All empty.

        Args:
            config: sizes, which `num_parts` divides.
            num_parts: into how many parts a mesh splits rows and pages.
        """
        self._config = config
        slots, self._pages = config.max_rows // num_parts, config.pages // num_parts
        self._parts = [
            _Part(
                range(i * slots, (i + 1) * slots),
                PagePool(self._pages, config.page_len, first=i * self._pages),
            )
            for i in range(num_parts)
        ]
        self._promises: dict[int, tuple[_Part, int]] = {}  # by the number of the request
        self.rows: dict[int, Row] = {}

    @property
    def pages_each(self) -> int:
        """Pages that a request can choose from: those of a part."""
        return self._pages

    @property
    def which_pages(self) -> str:
        """What `pages_each` counts, for errors."""
        return "pages" if len(self._parts) == 1 else "pages in each part of the mesh"

    @property
    def unpromised(self) -> int:
        """The most pages that can be promised to one more request."""
        return max(self._pages - part.promised for part in self._parts)

    @property
    def usage(self) -> PageUsage:
        """Pages by state."""
        return sum((part.pool.usage() for part in self._parts), PageUsage(0, 0, 0, 0))

    def forget_cached(self) -> None:
        """Makes every cached page free."""
        for part in self._parts:
            part.pool.forget_cached()

    def promise(self, ticket: Ticket, pages: int) -> None:
        """Promises pages, at most `unpromised`, of one part; the request will have to go there."""
        part = min(self._parts, key=lambda part: part.promised)
        part.promised += pages
        self._promises[ticket.number] = part, pages

    def redeem(self, ticket: Ticket) -> None:
        """Takes a promise back, if there is one: the request has ended."""
        if ticket.number in self._promises:
            part, pages = self._promises.pop(ticket.number)
            part.promised -= pages

    def enter(self, ticket: Ticket) -> Row | None:
        """Gives a request a row and pages, if there are any for it.

        Of several parts, where most of its prompt is known, then where most pages are left. A call
        costs the same however its rows are spread.
        """
        promised = self._promises.get(ticket.number)
        parts = self._parts if promised is None else [promised[0]]
        free = [(part.pool, i) for part in parts if (i := self._free_slot(part)) is not None]
        tokens = [*ticket.request.prompt, *ticket.tokens]
        free.sort(key=lambda place: (-len(place[0].known(tokens)), -place[0].available))
        for pool, slot in free:
            row = Row.enter(slot, ticket, tokens, pool)
            # With the pages of its first decode call, or it might be put back at once.
            if row.pages.reserve(row.room(self._config)):
                self.rows[slot] = row
                return row
            row.pages.release()
        return None

    def leave(self, row: Row) -> None:
        """Frees a row and gives its pages back."""
        row.pages.release()
        del self.rows[row.slot]

    def row_of(self, ticket: Ticket) -> Row | None:
        """The row of a request, if it has one."""
        return next((row for row in self.rows.values() if row.ticket is ticket), None)

    def by_age(self, state: State) -> list[Row]:
        """The rows in a state, the oldest request first."""
        return _by_age(row for row in self.rows.values() if row.ticket.state is state)

    def youngest_beside(self, row: Row) -> Row:
        """Of the rows that use the same pool, the one of the youngest request; maybe itself."""
        return self._rows_in(self._part_of(row))[-1]

    def to_prefill(self) -> dict[int, Row]:
        """The rows whose prompts the next call takes in, by their index there.

        The oldest; each part has as many rows of the call as every other.
        """
        each = self._config.prefill_rows // len(self._parts)
        found: dict[int, Row] = {}
        for i, part in enumerate(self._parts):
            rows = [row for row in self._rows_in(part) if row.ticket.state is State.PREFILL]
            found |= {i * each + k: row for k, row in enumerate(rows[:each])}
        return found

    def _free_slot(self, part: _Part) -> int | None:
        return next((i for i in part.slots if i not in self.rows), None)

    def _part_of(self, row: Row) -> _Part:
        return next(part for part in self._parts if row.slot in part.slots)

    def _rows_in(self, part: _Part) -> list[Row]:
        return _by_age(row for slot, row in self.rows.items() if slot in part.slots)


def _by_age(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row.ticket.number)
