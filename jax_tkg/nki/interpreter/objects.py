"""`NKIObject`: what the compiler makes of a kernel's classes."""

import dataclasses
import inspect
from typing import Any


class NKIObject:
    """Base class of the classes a kernel may use.

    As the compiler does, it gives a class without `__init__` one that takes its fields (annotated
    or not) by position or name, with None where the class names no default, and then calls
    `__post_init__`. `@dataclass` is optional and changes nothing of this.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        inherited = any("__init__" in c.__dict__ for c in cls.__mro__[:-2] if c is not NKIObject)
        if not inherited or cls.__init__ is _init_fields:
            cls.__init__ = _init_fields  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        """For subclasses."""


def _defaults(cls: type) -> dict[str, Any]:
    """The fields of a class, those of its bases first, and what makes their defaults."""
    found: dict[str, Any] = {}
    for c in reversed(cls.__mro__[:-2]):
        attributes = {
            name: value
            for name, value in vars(c).items()
            if not name.startswith("_")
            and not callable(value)
            and not isinstance(value, property | classmethod | staticmethod)
        }
        for name in [*inspect.get_annotations(c), *attributes]:
            found[name] = attributes.get(name, found.get(name))
    for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
        if field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def _init_fields(self: Any, *args: Any, **kwargs: Any) -> None:
    """`__init__` of a class that has none."""
    fields = _defaults(type(self))
    given = dict(zip(fields, args, strict=False))
    wrong = [name for name in kwargs if name not in fields or name in given]
    if wrong or len(args) > len(fields):
        raise TypeError(
            f"{type(self).__name__} has the fields {', '.join(fields)}; got {len(args)} by "
            f"position and {', '.join(kwargs) or 'none'} by name."
        )
    for name, value in {**fields, **given, **kwargs}.items():
        object.__setattr__(self, name, value)
    self.__post_init__()
