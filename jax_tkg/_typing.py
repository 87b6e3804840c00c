"""Shape annotations without a runtime dependency: jaxtyping's names, or stand-ins for them.

`Float[Array, "B T"]` means the same to a reader and to a type checker either way. With jaxtyping
installed (a development dependency) the shapes can be checked at run time; without it the
annotation is the plain array type.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, Key, Num, Shaped
else:
    try:
        from jaxtyping import AbstractDtype, Array, Bool, Float, Int, Key, Shaped
        from jaxtyping import Num as KnownNum

        class Num(AbstractDtype):
            """Any number; jaxtyping's own does not know Trainium's 8-bit float."""

            dtypes = (*KnownNum.dtypes, "float8_e4m3")
    except ImportError:
        from jax import Array

        class Shaped:
            """Stands in for jaxtyping's dtype classes: `Shaped[Array, "B T"]` is `Array`."""

            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                return item[0]

        Bool = Float = Int = Key = Num = Shaped

if TYPE_CHECKING:
    Leaf = Array
else:
    Leaf = Any
"""An array that is a leaf of a pytree: JAX puts types, axes or None in its place when it maps over
the tree, so it is not checked at run time."""

__all__ = ["Array", "Bool", "Float", "Int", "Key", "Leaf", "Num", "Shaped"]
