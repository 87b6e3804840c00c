"""Which mesh axes split what of an attention call: batch, heads, and the slots of the cache."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

Axes = str | tuple[str, ...] | None
"""No mesh axis, one, or several of which the first is outermost."""

ROLES = ("batch", "heads", "keys")
MERGES = ("deferred", "every tile")

_ROLES_OF = {
    "B": ("batch",),
    "N": ("heads",),
    "K": ("heads",),
    "S": ("keys",),
    "P": ("batch", "keys"),
}


@dataclass(frozen=True)
class AttentionSharding:
    """How an attention call and its cache lie on a mesh. Hashable; other mesh axes are left alone.

    Of a paged cache the pool is split as its rows are: a row's pages lie in the part of the pool of
    the device that has the row, and tables number the pages of the whole pool. An entry that names
    a page elsewhere counts as no page.

    Attributes:
        mesh: the mesh, with devices or abstract.
        batch: axes that split the rows B.
        heads: axes that split the query heads N and the KV heads K. They divide K, or K divides
            them: then every device keeps all KV heads and uses the one its query heads need.
        keys: axes that split the slots S of the cache (context parallelism): each device attends
            to its slots, and the parts of a row are merged by their log-sum-exps.
        merge: of such parts: "deferred", once at the end, or "every tile", where devices also
            exchange the running maximum of the logits on each tile of keys.
    """

    mesh: Mesh | AbstractMesh
    batch: Axes = None
    heads: Axes = None
    keys: Axes = None
    merge: str = "deferred"

    def __post_init__(self) -> None:
        if not isinstance(self.mesh, Mesh | AbstractMesh):
            raise TypeError(f"mesh must be a jax.sharding.Mesh or AbstractMesh; got {self.mesh!r}.")
        if self.merge not in MERGES:
            raise ValueError(f"merge must be one of {', '.join(MERGES)}; got {self.merge!r}.")
        taken: dict[str, str] = {}
        for role in ROLES:
            for name in self.names(role):
                if name not in self.mesh.shape:
                    raise ValueError(
                        f"{role} names the mesh axis {name!r}, and the mesh has "
                        f"{_listed(self.mesh.axis_names)}."
                    )
                if name in taken:
                    raise ValueError(
                        f"{role} and {taken[name]} both name the mesh axis {name!r}, which can "
                        "split one of them; give each axes of its own."
                    )
                taken[name] = role

    def names(self, role: str) -> tuple[str, ...]:
        """The mesh axes of "batch", "heads" or "keys".

        Raises:
            TypeError: if they are neither None, a name, nor a tuple of names.
        """
        given = getattr(self, role)
        if given is None:
            return ()
        names = (given,) if isinstance(given, str) else given
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise TypeError(
                f"{role} must be None, the name of a mesh axis or a tuple of names; got {given!r}."
            )
        return names

    def size(self, role: str) -> int:
        """Into how many parts "batch", "heads" or "keys" is split."""
        size = 1
        for name in self.names(role):
            size *= self.mesh.shape[name]
        return size

    @property
    def axis_names(self) -> tuple[str, ...]:
        """All mesh axes that are named, batch first."""
        return tuple(name for role in ROLES for name in self.names(role))

    def without(self, names: Iterable[str]) -> "AttentionSharding":
        """The same over fewer mesh axes: those that are mapped already."""
        gone = set(names)
        batch, heads, keys = (
            tuple(n for n in self.names(role) if n not in gone) or None for role in ROLES
        )
        return replace(self, batch=batch, heads=heads, keys=keys)

    def spec(self, axes: str, *, num_kv_heads: int | None = None) -> PartitionSpec:
        """How an array is split whose axes have these letters.

        Args:
            axes: B rows; N query heads; K KV heads; S slots, or the columns of a page table; P
                pages of a pool, split like rows and slots together; any other letter is not split.
            num_kv_heads: K; given, "K" stays whole where the axes of the heads do not divide it.
        """
        whole = num_kv_heads is not None and not self.splits_kv_heads(num_kv_heads)
        return PartitionSpec(*(None if a == "K" and whole else self._entry(a) for a in axes))

    def named(self, axes: str, *, num_kv_heads: int | None = None) -> NamedSharding:
        """As `spec`, on the mesh."""
        return NamedSharding(self.mesh, self.spec(axes, num_kv_heads=num_kv_heads))

    def splits_kv_heads(self, num_kv_heads: int) -> bool:
        """Whether so many KV heads are split, or kept whole by every device."""
        return num_kv_heads % self.size("heads") == 0

    def check(
        self,
        *,
        batch: int | None = None,
        slots: int | None = None,
        num_kv_heads: int | None = None,
        num_heads: int | None = None,
    ) -> None:
        """Checks that sizes divide; those left out are not looked at.

        Raises:
            ValueError: which number, over which axis, and what would do.
        """
        for role, letter, number in (("batch", "B", batch), ("keys", "S", slots)):
            parts = self.size(role)
            if number is not None and number % parts:
                raise ValueError(
                    f"{letter} = {number} does not divide into {parts} parts, the size of "
                    f"{self._described(role)} that {role} names: make it a multiple of {parts} "
                    f"(the next is {-(-number // parts) * parts}), or name other axes."
                )
        if num_kv_heads is not None:
            self._check_heads(num_kv_heads, num_heads)

    def _check_heads(self, num_kv_heads: int, num_heads: int | None) -> None:
        parts = self.size("heads")
        if _heads_fit(parts, num_kv_heads, num_heads):
            return
        most = num_kv_heads if num_heads is None else num_heads
        fitting = [n for n in range(1, most + 1) if _heads_fit(n, num_kv_heads, num_heads)]
        queries = "" if num_heads is None else f"N = {num_heads} query heads and "
        raise ValueError(
            f"{queries}K = {num_kv_heads} KV heads cannot be split into {parts} parts, the size of "
            f"{self._described('heads')} that heads names: it must divide the query heads, and "
            "divide the KV heads or be a multiple of them. Sizes that would do: "
            f"{', '.join(map(str, fitting))}; or name the axes as keys= instead."
        )

    def _entry(self, letter: str) -> Axes:
        names = tuple(n for role in _ROLES_OF.get(letter, ()) for n in self.names(role))
        return names if len(names) > 1 else names[0] if names else None

    def _described(self, role: str) -> str:
        return " x ".join(f"{n!r} ({self.mesh.shape[n]})" for n in self.names(role)) or "no axis"

    def __str__(self) -> str:
        """One line."""
        parts = [f"{r} over {self._described(r)}" for r in ROLES if self.names(r)]
        merged = f", merged {self.merge}" if self.names("keys") else ""
        return (", ".join(parts) or "nothing split") + merged


def _heads_fit(parts: int, num_kv_heads: int, num_heads: int | None) -> bool:
    if num_heads is not None and num_heads % parts:
        return False
    return num_kv_heads % parts == 0 or parts % num_kv_heads == 0


def _listed(names: Iterable[object]) -> str:
    return ", ".join(repr(name) for name in names) or "no axes"


def axis_kinds(mesh: Mesh | AbstractMesh) -> dict[str, AxisType]:
    """Auto, Explicit or Manual, for each axis of a mesh."""
    return dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
