"""What there is to see after a run: counters, modelled times, timelines, a summary.

Counters are facts of the run. Times are those of a model (docs/time-model.md), not measurements.
"""

from jax_tkg.nki.interpreter.report.counters import Counters, counters, difference
from jax_tkg.nki.interpreter.report.drawing import draw_timeline
from jax_tkg.nki.interpreter.report.text import difference_table, summary
from jax_tkg.nki.interpreter.report.timeline import write_trace
from jax_tkg.nki.interpreter.report.timing import Timing, timing

__all__ = [
    "Counters",
    "Timing",
    "counters",
    "difference",
    "difference_table",
    "draw_timeline",
    "summary",
    "timing",
    "write_trace",
]
