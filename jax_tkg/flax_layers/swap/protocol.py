"""What an adapter is: how the attention of a client's module is read.

An adapter belongs to one class of one client. It is found by the names of the class and of the
Python module that defines it, so no client is imported unless its user imports it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol, runtime_checkable

from jax_tkg._typing import Array, Bool, Float
from jax_tkg.flax_layers.swap.report import SwapReport, warn


@dataclass(frozen=True)
class Client:
    """The package whose modules an adapter reads.

    Attributes:
        package: name of the distribution, None for code of one's own.
        tested: versions that the tests ran with: (first, one behind the last), as tuples of
            numbers, such as ((4, 57), (4, 58)).
    """

    package: str | None = None
    tested: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def installed(self) -> str | None:
        """The installed version, None if there is none."""
        if self.package is None:
            return None
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    def why_untested(self) -> str | None:
        """None if the installed version is one that the tests ran with, else the reason."""
        found = self.installed()
        if self.tested is None or found is None:
            return None
        first, behind = self.tested
        if first <= numbers(found) < behind:
            return None
        low, high = (".".join(map(str, v)) for v in self.tested)
        return f"{self.package} {found} is not one of the versions tested, {low} to below {high}"


def numbers(release: str) -> tuple[int, ...]:
    """The leading numbers of a version: "4.57.6rc1" is (4, 57, 6)."""
    parts: list[int] = []
    for part in release.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        parts.append(int(digits))
        if digits != part:
            break
    return tuple(parts)


@runtime_checkable
class Adapter(Protocol):
    """What adapters of linen and nnx clients have in common."""

    @property
    def name(self) -> str:
        """In reports."""

    @property
    def client(self) -> Client:
        """Where the class comes from."""

    @property
    def module_name(self) -> str:
        """Of the Python module that defines the class: "package.models.llama"."""

    @property
    def class_name(self) -> str:
        """Of the attention module; subclasses count."""


@dataclass(frozen=True)
class CacheVariables:
    """The names of a linen module's cache: keys and values `[B, S, K, H]`, and a scalar index.

    Attributes:
        collection: the variable collection.
        key: name of the cached keys.
        value: name of the cached values.
        index: name of the int32 scalar, the slot that the next token is written to, in all rows.
    """

    collection: str = "cache"
    key: str = "cached_key"
    value: str = "cached_value"
    index: str = "cache_index"


@dataclass(frozen=True)
class LinenCall:
    """One call of an attention module, read by its adapter.

    Attributes:
        query: `[B, T, N, H]`, rotated if the client does so, not scaled.
        key: the same tokens' keys `[B, T, K, H]`; K need not be N.
        value: `[B, T, K, Hv]`.
        cache: names of the cache's variables; None if the class has no cache.
        create_cache: whether the call is the one that makes the variables.
        key_mask: bool `[B, S']`, False for slots that no query of the row may see; S' is S with a
            cache, else T. Usually padding.
        bias: float, broadcasts to `[B, N, T, S']`; added to the logits, -inf masks.
        scale: factor of the logits, by default 1 / sqrt(H).
        is_causal: whether a token sees only slots up to its own.
        left_window: slots to its left that a token sees, its own not counted; None for all.
        logits_soft_cap: c in `c * tanh(logit / c)`.
    """

    query: Float[Array, "B T N H"]
    key: Float[Array, "B T K H"]
    value: Float[Array, "B T K Hv"]
    cache: CacheVariables | None = None
    create_cache: bool = False
    key_mask: Bool[Array, "B S"] | None = None
    bias: Float[Array, "..."] | None = None
    scale: float | None = None
    is_causal: bool = True
    left_window: int | None = None
    logits_soft_cap: float | None = None


@runtime_checkable
class LinenAdapter(Adapter, Protocol):
    """How the attention of one linen class is read; inherit from it. docs/swap.md has an example.

    `read` and `finish` run where the module's `__call__` would: its submodules are set up and can
    be called, `module.make_rng` and `module.get_variable` work. A module's arguments come by name,
    with their defaults filled in.
    """

    def is_for(self, module: Any) -> str | None:
        """None if the module is to be swapped, else why it is left alone; the report says so."""
        del module
        return None

    def why_not(self, module: Any, arguments: Mapping[str, Any]) -> str | None:
        """None if this call can be swapped, else why not: then the swap raises."""
        del module, arguments
        return None

    def notes(self, module: Any) -> Sequence[str]:
        """What the user should know about this client; each is warned of once."""
        del module
        return ()

    def read(self, module: Any, arguments: Mapping[str, Any]) -> LinenCall:
        """Projects the new tokens and says what they see."""
        raise NotImplementedError

    def finish(
        self, module: Any, arguments: Mapping[str, Any], out: Float[Array, "B T N Hv"]
    ) -> Any:
        """From the attention's output to what `__call__` returns."""
        raise NotImplementedError


@dataclass
class Directory:
    """Adapters by the class they are for; asked for every module that runs.

    Attributes:
        adapters: the first whose class is that of a module, or a base of it, is used.
        report: is told which are used.
    """

    adapters: Sequence[Any]
    report: SwapReport
    _known: dict[type, Any] = field(default_factory=dict)

    def find(self, cls: type) -> Any:
        """The adapter of a module class, or None.

        Warns:
            SwapWarning: when it is used for the first time with a client of another version than
                those tested.
        """
        if cls not in self._known:
            self._known[cls] = self._search(cls)
        return self._known[cls]

    def _search(self, cls: type) -> Any:
        for adapter in self.adapters:
            wanted = (adapter.module_name, adapter.class_name)
            if wanted not in {(base.__module__, base.__name__) for base in cls.__mro__}:
                continue
            client: Client = adapter.client
            found = client.installed()
            name = f"{adapter.name} of {client.package} {found}" if found else adapter.name
            reason = client.why_untested()
            if reason is not None and name not in self.report.adapters:
                warn(f"{adapter.name}: {reason}. Compare the text before and after the swap.")
            self.report.use(name)
            return adapter
        return None
