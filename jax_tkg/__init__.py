"""Token-generation (decode) flash attention for JAX and Flax.

`attention_tkg` attends from a few new tokens to a long KV cache, `attention_cte` from a whole
prompt or a chunk of one; `explain` says which implementation runs it. `KVCache`, `RingKVCache` and
`PagedKVCache` hold keys and values; layers and decoders are in `jax_tkg.flax_layers`, real models
in `jax_tkg.models`.
"""

from jax_tkg.attention import Explanation, attention_tkg, explain
from jax_tkg.cache.kv_cache import KVCache, RingKVCache
from jax_tkg.cache.layouts import BKHS, BKSH, BSKH, KVLayout
from jax_tkg.cache.paged import Paged
from jax_tkg.cache.paged_cache import PagedKVCache
from jax_tkg.cache.storage import absmax_scale
from jax_tkg.generation.adaptive import Adaptive
from jax_tkg.generation.api import Generated, generate, stream
from jax_tkg.generation.draft_model import DraftModel
from jax_tkg.generation.drafts import PromptLookup
from jax_tkg.implementations import IMPLEMENTATIONS, Implementation
from jax_tkg.online.plan import Target
from jax_tkg.prefill.attention import attention_cte
from jax_tkg.prefill.segments import segment_key_bounds
from jax_tkg.problem import AttentionProblem
from jax_tkg.rope import LinearScaling, Llama3Scaling, RotaryEmbedding
from jax_tkg.sampling import Greedy, Sample, TokenSelector, argmax_tokens
from jax_tkg.sharding.spec import AttentionSharding
from jax_tkg.softmax import SoftmaxState, merge_attention

__version__ = "0.1.0"

__all__ = [
    "BKHS",
    "BKSH",
    "BSKH",
    "IMPLEMENTATIONS",
    "Adaptive",
    "AttentionProblem",
    "AttentionSharding",
    "DraftModel",
    "Explanation",
    "Generated",
    "Greedy",
    "Implementation",
    "KVCache",
    "KVLayout",
    "LinearScaling",
    "Llama3Scaling",
    "Paged",
    "PagedKVCache",
    "PromptLookup",
    "RingKVCache",
    "RotaryEmbedding",
    "Sample",
    "SoftmaxState",
    "Target",
    "TokenSelector",
    "absmax_scale",
    "argmax_tokens",
    "attention_cte",
    "attention_tkg",
    "explain",
    "generate",
    "merge_attention",
    "segment_key_bounds",
    "stream",
]
