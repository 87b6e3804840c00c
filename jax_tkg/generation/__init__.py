"""Text generation: chunked prefill and a compiled decode loop over any model with KV caches.

`generate` returns all tokens, `stream` hands them out as they come, `show` prints a stream with its
speed. `prefill_chunk`, `decode` and `decode_step` are the compiled parts they are made of;
`decode_speculatively` is the loop that verifies several drafts a step; `Adaptive` says when, by
what `step_times` measures.
"""

from typing import TYPE_CHECKING, Any

from jax_tkg.generation.adaptive import Adaptive, Pace, PausableDrafter
from jax_tkg.generation.api import generate, stream
from jax_tkg.generation.draft_model import DraftModel
from jax_tkg.generation.drafts import Drafter, Drafts, PromptLookup
from jax_tkg.generation.loop import (
    DecodeState,
    decode,
    decode_scored,
    decode_step,
    prefill,
    prefill_chunk,
    token_log_probs,
)
from jax_tkg.generation.model import (
    DecodeModel,
    ScoringModel,
    as_pytree,
    last_real,
    scoring_pytree,
    truncate_caches,
)
from jax_tkg.generation.policy import TokenPolicy, portable_key
from jax_tkg.generation.prompts import PaddedPrompts, pad_prompts
from jax_tkg.generation.results import Acceptance, Generated
from jax_tkg.generation.speculation import (
    Emitted,
    SpeculativeState,
    decode_speculatively,
    decode_undrafted,
    speculative_step,
)
from jax_tkg.generation.timing import StepTimes, step_times
from jax_tkg.generation.verification import DistributionSelector

if TYPE_CHECKING:
    from jax_tkg.generation.display import Speed, show

__all__ = [
    "Acceptance",
    "Adaptive",
    "DecodeModel",
    "DecodeState",
    "DistributionSelector",
    "DraftModel",
    "Drafter",
    "Drafts",
    "Emitted",
    "Generated",
    "Pace",
    "PaddedPrompts",
    "PausableDrafter",
    "PromptLookup",
    "ScoringModel",
    "SpeculativeState",
    "Speed",
    "StepTimes",
    "TokenPolicy",
    "as_pytree",
    "decode",
    "decode_scored",
    "decode_speculatively",
    "decode_step",
    "decode_undrafted",
    "generate",
    "last_real",
    "pad_prompts",
    "portable_key",
    "prefill",
    "prefill_chunk",
    "scoring_pytree",
    "show",
    "speculative_step",
    "step_times",
    "stream",
    "token_log_probs",
    "truncate_caches",
]


def __getattr__(name: str) -> Any:
    """Imports the display, and with it rich, when it is first asked for."""
    if name not in ("Speed", "show"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from jax_tkg.generation import display

    return getattr(display, name)
