"""Which hardware the kernel is built for."""

import enum

from jax_tkg.nki.interpreter.machine import current_core


class nc_version(enum.IntEnum):  # noqa: N801  (NKI's name)
    """Generation of the NeuronCore."""

    gen2 = 2
    gen3 = 3
    gen4 = 4


def get_nc_version() -> nc_version:
    """The generation."""
    return nc_version(current_core().target.generation)


def get_nc_sub_version() -> int:
    """The revision of the silicon: always the first."""
    return 0
