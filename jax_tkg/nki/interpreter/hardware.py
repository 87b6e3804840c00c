"""Constants of the hardware, with units and sources.

Sources: [A1] "Trainium/Inferentia2 architecture guide", [A2] "Trainium2 architecture guide", [A3]
"Trainium3 architecture guide", [D] "NKI DMA bandwidth guide", [I] the docstrings of `nki.isa`, all
of the AWS Neuron SDK documentation 2.32; [C] the cycle estimates that `nki.isa` printed up to
2.26. What is marked [assumed] is documented nowhere; it only enters the time model.
"""

from dataclasses import dataclass

KIB = 1024
NUM_PARTITIONS = 128  # [A1]
QUADRANT = 32  # partitions; [A1]
PSUM_BANKS = 8  # [A1]
PSUM_BANK_BYTES = 2 * KIB  # per partition; [A1]
PSUM_BYTES = PSUM_BANKS * PSUM_BANK_BYTES


@dataclass(frozen=True)
class Target:
    """One generation of NeuronCore.

    Attributes:
        name: as in `NEURON_PLATFORM_TARGET_OVERRIDE`.
        generation: 2, 3, 4: the number of `nki.isa.nc_version`.
        sbuf_bytes: per partition, physical.
        sbuf_usable_bytes: per partition, what a kernel may use; about 16 KiB less.
        moving_max: columns of the moving operand of a matmul, float32 results.
        tensor_ghz, vector_ghz, scalar_ghz, gpsimd_ghz: clocks.
        hbm_gbps: HBM bandwidth of one core, GB/s.
        dma_gbps: what the 16 DMA queues of one core reach in practice, GB/s.
        has_sendrecv: two cores of a logical core can exchange tiles.
    """

    name: str
    generation: int
    sbuf_bytes: int
    sbuf_usable_bytes: int
    moving_max: int
    tensor_ghz: float
    vector_ghz: float
    scalar_ghz: float
    gpsimd_ghz: float
    hbm_gbps: float
    dma_gbps: float
    has_sendrecv: bool

    @property
    def stationary_max(self) -> int:
        """Columns of the stationary operand of a matmul."""
        return NUM_PARTITIONS


# [A1], [A2], [A3]; trn2 and trn3 bandwidths are the chip's divided by its eight cores.
TRN1 = Target(
    "trn1", 2, 192 * KIB, 176 * KIB, 512, 2.8, 0.96, 1.4, 1.4, 410.0, 272.0, has_sendrecv=False
)
TRN2 = Target(
    "trn2", 3, 224 * KIB, 208 * KIB, 512, 2.4, 0.96, 1.2, 1.2, 362.0, 368.0, has_sendrecv=True
)
TRN3 = Target(
    "trn3", 4, 256 * KIB, 240 * KIB, 4096, 2.4, 1.2, 1.2, 1.2, 610.0, 528.0, has_sendrecv=True
)
TARGETS = {t.name: t for t in (TRN1, TRN2, TRN3)}
_ALIASES = {"gen2": "trn1", "inf2": "trn1", "gen3": "trn2", "gen4": "trn3"}


def find_target(name: str | Target) -> Target:
    """A target by name: trn1, trn2, trn3, or gen2, inf2, gen3, gen4.

    Raises:
        ValueError: if there is none of this name.
    """
    if isinstance(name, Target):
        return name
    known = _ALIASES.get(name, name)
    if known not in TARGETS:
        raise ValueError(f"no target {name!r}; there are {', '.join([*TARGETS, *_ALIASES])}.")
    return TARGETS[known]
