"""The decode kernel's two programs in pure JAX, over a named axis `lnc`; see docs/sharding.md."""
