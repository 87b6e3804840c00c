"""Prefill (context encoding): the public op, its plan, and the pure-JAX loops over tiles."""
