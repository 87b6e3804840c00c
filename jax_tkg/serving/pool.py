"""Who uses which page: kept on the host, so that the compiled steps allocate nothing.

A page is *used* by one or more requests, or *cached* (no request uses it, but its tokens are known
and a later request that begins with the same tokens may), or *free*. Only full pages are shared,
and these are never written again.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import astuple, dataclass

_NO_PREFIX = 0


@dataclass(frozen=True)
class PageUsage:
    """How many pages are in which state.

    Attributes:
        used: by requests.
        shared: of those, by two or more.
        cached: by none, but their tokens are known.
        free: holding nothing.
    """

    used: int
    shared: int
    cached: int
    free: int

    def __add__(self, other: "PageUsage") -> "PageUsage":
        """Of two pools."""
        return PageUsage(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        """One line."""
        total = self.used + self.cached + self.free
        return f"{self.used} of {total} pages used ({self.shared} shared), {self.cached} cached"


class PagePool:
    """Pages of consecutive numbers, handed out and taken back."""

    def __init__(self, num_pages: int, page_len: int, *, first: int = 0) -> None:
        """A pool in which every page is free.

        Args:
            num_pages: pages.
            page_len: tokens of a page.
            first: number of the first page.
        """
        self.page_len = page_len
        numbers = range(first, first + num_pages)
        self._free = list(reversed(numbers))
        self._users = dict.fromkeys(numbers, 0)
        # What a page holds: the number of the prefix before it, and its tokens. Exact: a hash alone
        # could give a request the keys of other tokens.
        self._page_of: dict[tuple[int, tuple[int, ...]], int] = {}
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._prefix_of: dict[int, int] = {}
        self._prefixes = _NO_PREFIX
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def available(self) -> int:
        """Pages that can be handed out: the free and the cached."""
        return len(self._free) + len(self._cached)

    def usage(self) -> PageUsage:
        """Pages by state."""
        used = sum(users > 0 for users in self._users.values())
        shared = sum(users > 1 for users in self._users.values())
        return PageUsage(used, shared, len(self._cached), len(self._free))

    def forget_cached(self) -> None:
        """Makes every cached page free."""
        while self._cached:
            self._free.append(self._forget_oldest())

    def known(self, tokens: Sequence[int]) -> list[tuple[int, int]]:
        """The pages that hold the beginning of a prompt, and the number of the prefix up to each.

        Full pages, and not the one of the last token, which must be computed for what follows it.
        """
        found: list[tuple[int, int]] = []
        prefix = _NO_PREFIX
        for end in range(self.page_len, len(tokens), self.page_len):
            page = self._page_of.get((prefix, tuple(tokens[end - self.page_len : end])))
            if page is None:
                break
            prefix = self._prefix_of[page]
            found.append((page, prefix))
        return found

    def use(self, page: int) -> None:
        """Adds a user to a page that is known."""
        self._cached.pop(page, None)
        self._users[page] += 1

    def take(self, count: int) -> list[int] | None:
        """So many pages for one user, or None if there are fewer."""
        if count > self.available:
            return None
        pages = [self._free.pop() if self._free else self._forget_oldest() for _ in range(count)]
        for page in pages:
            self._users[page] = 1
        return pages

    def give_back(self, page: int) -> None:
        """Takes a user from a page; without users it is cached if it can be found, else free."""
        self._users[page] -= 1
        if self._users[page]:
            return
        if page in self._key_of:
            self._cached[page] = None
        else:
            self._free.append(page)

    def know(self, page: int, prefix: int, tokens: tuple[int, ...]) -> int:
        """Makes a full page findable, unless another with the same tokens is; the longer prefix."""
        found = self._page_of.get((prefix, tokens))
        if found is not None:
            return self._prefix_of[found]
        self._prefixes += 1
        self._page_of[prefix, tokens] = page
        self._key_of[page] = prefix, tokens
        self._prefix_of[page] = self._prefixes
        return self._prefixes

    def _forget_oldest(self) -> int:
        page, _ = self._cached.popitem(last=False)
        del self._page_of[self._key_of.pop(page)], self._prefix_of[page]
        return page


class RowPages:
    """The pages of one request: slot s is in `pages[s // page_len]`."""

    def __init__(self, pool: PagePool, tokens: Sequence[int]) -> None:
        """Shares what the pool knows of a prompt.

        Args:
            pool: where pages come from.
            tokens: of the prompt.
        """
        self._pool = pool
        found = pool.known(tokens)
        self._prefix = found[-1][1] if found else _NO_PREFIX
        self._known = len(found)
        self.pages = [page for page, _ in found]
        for page in self.pages:
            pool.use(page)
        self.shared_tokens = self._known * pool.page_len

    def reserve(self, tokens: int) -> bool:
        """Takes the pages that so many tokens need beyond those there are: all of them or none."""
        missing = -(-tokens // self._pool.page_len) - len(self.pages)
        more = self._pool.take(max(missing, 0))
        if more is None:
            return False
        self.pages += more
        return True

    def keep(self, tokens: int) -> None:
        """Gives back the pages behind those that so many tokens need."""
        needed = -(-tokens // self._pool.page_len)
        for page in reversed(self.pages[needed:]):
            self._pool.give_back(page)
        del self.pages[needed:]

    def written(self, tokens: Sequence[int], count: int) -> None:
        """Lets others share the pages that are full now.

        Args:
            tokens: of the request.
            count: how many, the first ones, have been written.
        """
        while (self._known + 1) * self._pool.page_len <= count:
            begin, end = (n * self._pool.page_len for n in (self._known, self._known + 1))
            page = self.pages[self._known]
            self._prefix = self._pool.know(page, self._prefix, tuple(tokens[begin:end]))
            self._known += 1

    def release(self) -> None:
        """Gives all pages back; of those that stay cached, the ends of prompts go first."""
        for page in reversed(self.pages):
            self._pool.give_back(page)
        self.pages = []
