"""Text to token ids and back, built from the tokenizer inside a GGUF file."""

from __future__ import annotations

import codecs
import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NoReturn, SupportsIndex

import jinja2
import jinja2.sandbox
import tokenizers
from tokenizers import models, pre_tokenizers

from jax_tkg.models.metadata import TokenizerMetadata, TokenType, UnsupportedModelError

# Ends of a document or a chat turn that files do not always name in their metadata.
_END_TOKENS = frozenset({"<|endoftext|>", "<|im_end|>"})


class Tokenizer:
    """Byte-level BPE with chat template and streaming decode.

    Attributes:
        metadata: The description it was built from.
        eos_ids: Ids that end a generation: end of sequence, of turn and of document.
    """

    metadata: TokenizerMetadata
    eos_ids: frozenset[int]

    def __init__(self, metadata: TokenizerMetadata) -> None:
        """Builds the tokenizer.

        Args:
            metadata: For example `read_gguf(path).tokenizer_metadata`.

        Raises:
            UnsupportedModelError: The merges do not fit the vocabulary.
        """
        self.metadata = metadata
        self._bpe = _build_bpe(metadata)
        named = {metadata.eos_id, metadata.end_of_turn_id} - {None}
        control = _ids_of_type(metadata, TokenType.CONTROL)
        texts = {i for i in control if metadata.tokens[i] in _END_TOKENS}
        self.eos_ids = frozenset(i for i in named | texts if i is not None)

    def encode(self, text: str) -> list[int]:
        """Turns text into token ids.

        Control tokens written out in the text, as a chat template does, become their ids. A BOS
        token is put first if the model asks for it and the text does not already start with
        it. Bytes that the vocabulary lacks (some control characters, in SmolLM2) are dropped,
        as the reference tokenizers do.

        Args:
            text: Any Unicode text.

        Returns:
            Token ids; empty for an empty text without BOS.
        """
        ids: list[int] = self._bpe.encode(text, add_special_tokens=False).ids
        bos = self.metadata.bos_id
        if self.metadata.add_bos and bos is not None and ids[:1] != [bos]:
            return [bos, *ids]
        return ids

    def decode(self, ids: Iterable[SupportsIndex], skip_special: bool = True) -> str:
        """Turns token ids into text.

        Args:
            ids: Token ids (Python, NumPy or JAX integers).
            skip_special: Leave out control tokens.

        Returns:
            The text; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: An id outside the vocabulary.
        """
        data = b"".join(self._token_bytes(token_id, skip_special) for token_id in ids)
        return data.decode("utf-8", errors="replace")

    def stream(self, skip_special: bool = True) -> StreamDecoder:
        """Returns a decoder for ids that arrive one by one.

        Args:
            skip_special: Leave out control tokens.
        """
        return StreamDecoder(lambda token_id: self._token_bytes(token_id, skip_special))

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Renders a conversation with the model's own template.

        Args:
            messages: Each with `role` (`"system"`, `"user"` or `"assistant"`) and `content`.
            add_generation_prompt: Open the assistant's turn at the end.

        Returns:
            Text for `encode`.

        Raises:
            ValueError: The model has no template, a message lacks `role` or `content`, or the
                template refuses the conversation.
        """
        for i, message in enumerate(messages):
            if missing := {"role", "content"} - message.keys():
                raise ValueError(
                    f"message {i} lacks {' and '.join(sorted(missing))}; it has "
                    f"{sorted(message)}. Give each message a role and a content."
                )
        try:
            return self._chat_template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token=self._text_of(self.metadata.bos_id),
                eos_token=self._text_of(self.metadata.eos_id),
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the model's chat template failed: {error}") from error

    @functools.cached_property
    def _chat_template(self) -> jinja2.Template:
        if self.metadata.chat_template is None:
            raise ValueError(
                "this model has no chat template: it completes text. Encode the prompt itself."
            )
        # The template comes with the file, so it runs in a sandbox. Block trimming is the
        # convention that chat templates are written for.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True
        )
        environment.globals["raise_exception"] = _raise_template_error
        return environment.from_string(self.metadata.chat_template)

    def _text_of(self, token_id: int | None) -> str:
        return "" if token_id is None else self.metadata.tokens[token_id]

    def _token_bytes(self, token_id: SupportsIndex, skip_special: bool) -> bytes:
        index = operator.index(token_id)
        if not 0 <= index < len(self.metadata.tokens):
            raise ValueError(
                f"token id {index} is outside the vocabulary of {len(self.metadata.tokens)} tokens."
            )
        token = self.metadata.tokens[index]
        kind = self.metadata.token_types[index]
        if kind == TokenType.CONTROL:
            return b"" if skip_special else token.encode()
        if kind == TokenType.USER_DEFINED or not _BYTE_OF_CHARACTER.keys() >= set(token):
            return token.encode()
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)


class StreamDecoder:
    """Decodes token ids one at a time, never emitting part of a UTF-8 character.

    The pieces of a whole sequence, with `flush` last, concatenate to `Tokenizer.decode` of it.
    """

    def __init__(self, token_bytes: Callable[[SupportsIndex], bytes]) -> None:
        """Use `Tokenizer.stream`.

        Args:
            token_bytes: Gives the bytes that a token id stands for.
        """
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: SupportsIndex) -> str:
        """Adds one token.

        Args:
            token_id: The next id.

        Returns:
            The text completed by this token; empty while a character is incomplete.

        Raises:
            ValueError: The id is outside the vocabulary.
        """
        return self._utf8.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        """Ends the sequence; the decoder is then ready for another.

        Returns:
            U+FFFD if a character was left incomplete, else an empty string.
        """
        return self._utf8.decode(b"", final=True)


def _ids_of_type(metadata: TokenizerMetadata, kind: TokenType) -> list[int]:
    return [i for i, value in enumerate(metadata.token_types) if value == kind]


def _build_bpe(metadata: TokenizerMetadata) -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(metadata.tokens)}
    merges = []
    for merge in metadata.merges:
        left, _, right = merge.partition(" ")
        if not vocab.keys() >= {left, right, left + right}:
            raise UnsupportedModelError(
                f"the merge {merge!r} uses or makes a token outside the vocabulary."
            )
        merges.append((left, right))
    bpe = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    # These are found in the text as they stand, before it is split.
    bpe.add_special_tokens([metadata.tokens[i] for i in _ids_of_type(metadata, TokenType.CONTROL)])
    bpe.add_tokens([metadata.tokens[i] for i in _ids_of_type(metadata, TokenType.USER_DEFINED)])
    return bpe


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, as a map from character to byte.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for the
    characters from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_level_alphabet()


def _raise_template_error(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
