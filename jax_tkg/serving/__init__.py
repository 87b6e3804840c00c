"""Continuous batching: requests of different lengths join and leave one running batch.

    engine = Engine(model, ServingConfig(max_rows=8, pages_per_sequence=32))
    ticket = engine.submit(Request(prompt=[1, 2, 3], max_new_tokens=20))
    for event in engine.stream(ticket): ...

Keys and values are in pages that the host hands out (`pool.py`); the compiled steps
(`jax_tkg.serving.programs`) have fixed shapes and keep no state but these pages.
"""

from jax_tkg.serving.config import ServingConfig
from jax_tkg.serving.engine import Engine
from jax_tkg.serving.pool import PageUsage
from jax_tkg.serving.request import (
    Completion,
    Event,
    FinishReason,
    NewToken,
    OutOfPagesError,
    Request,
    SamplingSettings,
    State,
    Ticket,
)
from jax_tkg.serving.speculation import SpeculationUsage
from jax_tkg.serving.text import TextStream, TokenDecoder

__all__ = [
    "Completion",
    "Engine",
    "Event",
    "FinishReason",
    "NewToken",
    "OutOfPagesError",
    "PageUsage",
    "Request",
    "SamplingSettings",
    "ServingConfig",
    "SpeculationUsage",
    "State",
    "TextStream",
    "Ticket",
    "TokenDecoder",
]
