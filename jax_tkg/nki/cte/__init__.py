"""The context-encoding (prefill) kernel; `kernel.py` is the algorithm, the others its steps."""
