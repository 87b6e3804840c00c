"""What a model file says about its decoder and its tokenizer: plain values, no dependencies."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class UnsupportedModelError(ValueError):
    """The file is not one that these readers can turn into a correct model."""


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of a Llama-style decoder.

    Attributes:
        num_layers: Decoder layers.
        hidden_size: Width D of the residual stream.
        num_heads: Query heads N.
        num_kv_heads: Key/value heads K; N is a multiple of K.
        head_dim: Head width H, the same for keys and values; even, for RoPE.
        mlp_size: Width of the gated MLP.
        rope_base: RoPE base (theta).
        rms_eps: Epsilon inside the RMS norms.
        context_length: Positions the model was trained for, in tokens.
        vocab_size: Rows V of the embedding.
        tie_embeddings: Whether the embedding is also the output projection.

    Raises:
        UnsupportedModelError: N is not a multiple of K, or H is odd.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    rope_base: float
    rms_eps: float
    context_length: int
    vocab_size: int
    tie_embeddings: bool

    def __post_init__(self) -> None:
        """Checks what no decoder could run."""
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise UnsupportedModelError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads: "
                "the first must be a multiple of the second."
            )
        if self.head_dim % 2:
            raise UnsupportedModelError(f"RoPE needs an even head_dim; got {self.head_dim}.")


class TokenType(enum.IntEnum):
    """The kinds of vocabulary entry that GGUF distinguishes."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_SUPPORTED_TOKENIZERS = frozenset({("gpt2", "smollm")})


@dataclass(frozen=True)
class TokenizerMetadata:
    """A byte-level BPE tokenizer, as a GGUF file describes it.

    Attributes:
        model: Tokenizer family; only `"gpt2"` (byte-level BPE) is supported.
        pre: Name of the text splitting rule; only `"smollm"` is supported.
        tokens: Vocabulary in id order, in the byte-level alphabet of GPT-2.
        merges: Merge rules, best first, each `"left right"`.
        token_types: A `TokenType` value for each token.
        bos_id: Beginning-of-sequence id, or None.
        eos_id: End-of-sequence id, or None.
        end_of_turn_id: Id that ends a chat turn, where the file names one, or None.
        unknown_id: Id of the unknown token, or None. Byte-level BPE does not use it.
        padding_id: Id for padding, or None.
        add_bos: Whether encoded text starts with `bos_id`.
        chat_template: Jinja2 source that renders chat messages, or None.

    Raises:
        UnsupportedModelError: Another kind of tokenizer, or values that contradict each other.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    merges: tuple[str, ...]
    token_types: tuple[int, ...]
    bos_id: int | None
    eos_id: int | None
    end_of_turn_id: int | None
    unknown_id: int | None
    padding_id: int | None
    add_bos: bool
    chat_template: str | None

    def __post_init__(self) -> None:
        """Checks the kind of tokenizer and that its parts agree."""
        if (self.model, self.pre) not in _SUPPORTED_TOKENIZERS:
            supported = ", ".join(f"model={m!r} pre={p!r}" for m, p in _SUPPORTED_TOKENIZERS)
            raise UnsupportedModelError(
                f"unsupported tokenizer: model={self.model!r} pre={self.pre!r}; its text would "
                f"be split wrongly. Supported: {supported}."
            )
        if len(self.token_types) != len(self.tokens):
            raise UnsupportedModelError(
                f"the tokenizer has {len(self.tokens)} tokens but {len(self.token_types)} types."
            )
        if len(set(self.tokens)) != len(self.tokens):
            raise UnsupportedModelError("the tokenizer lists the same token twice.")
        for name in ("bos_id", "eos_id", "end_of_turn_id", "unknown_id", "padding_id"):
            token_id: int | None = getattr(self, name)
            if token_id is not None and not 0 <= token_id < len(self.tokens):
                raise UnsupportedModelError(
                    f"{name} is {token_id}, outside the vocabulary of {len(self.tokens)} tokens."
                )
        if self.add_bos and self.bos_id is None:
            raise UnsupportedModelError("the tokenizer asks for a BOS token but names none.")
