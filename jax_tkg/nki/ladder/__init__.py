"""From a row maximum to flash attention, one operator more at a time: kernels to learn from.

Each rung keeps logits in PSUM and reads them more than once there: the row maximum on the Vector
engine, and the exponential with its row sum on the Scalar engine. Queries lie on the partitions,
so that maxima and sums are columns and broadcast by themselves. `jax_tkg.nki.ladder.rungs` lists
them with what each is held to.
"""
