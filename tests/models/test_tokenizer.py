"""The tokenizer against a naive BPE, and its byte-exact decoding."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_tkg.models import Tokenizer, TokenizerMetadata, UnsupportedModelError

# GPT-2's splitting rule, for ASCII; digits are cut out before.
WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[a-zA-Z]+| ?[^\sa-zA-Z]+|\s+(?!\S)|\s+")
ASCII = st.text(alphabet=[*map(chr, range(32, 127)), "\n", "\t"])
MESSAGES = [{"role": "user", "content": "hello"}]


def naive_encode(text: str, metadata: TokenizerMetadata) -> list[int]:
    """BPE by the book for ASCII text without control tokens."""
    pieces: list[str] = []
    for part in re.split(r"([0-9])", text):
        pieces += WORD.findall(part) if not part.isdigit() else [part]
    ids = []
    for piece in pieces:
        symbols = [{" ": "Ġ", "\n": "Ċ", "\t": "ĉ"}.get(c, c) for c in piece]
        for _ in piece:
            pairs = [f"{a} {b}" for a, b in itertools.pairwise(symbols)]
            rank, at = min(
                (
                    (metadata.merges.index(p), i)
                    for i, p in enumerate(pairs)
                    if p in metadata.merges
                ),
                default=(-1, -1),
            )
            if rank >= 0:
                symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        ids += [metadata.tokens.index(symbol) for symbol in symbols]
    return ids


@pytest.fixture(scope="module")
def metadata(make_metadata: Any) -> TokenizerMetadata:
    return make_metadata()


@pytest.fixture(scope="module")
def tokenizer(metadata: TokenizerMetadata) -> Tokenizer:
    return Tokenizer(metadata)


def texts_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.metadata.tokens[i] for i in ids]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("hello world", ["hello", "Ġw", *"orld"]),
        ("ll w", ["ll", "Ġw"]),
        ("12 1", ["1", "2", "Ġ", "1"]),
        ("é", ["Ã©"]),
        ("l \n", ["l", "Ġ", "Ċ"]),
        ("", []),
    ],
)
def test_encode_by_hand(tokenizer: Tokenizer, text: str, tokens: list[str]) -> None:
    assert texts_of(tokenizer, tokenizer.encode(text)) == tokens


@settings(deadline=None)
@given(text=(ASCII | st.text(alphabet="helo w12\n")).filter(lambda text: "<|" not in text))
def test_encode_equals_naive_bpe(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text) == naive_encode(text, tokenizer.metadata)


@settings(deadline=None)
@given(text=st.text() | ASCII)
def test_decode_inverts_encode(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=False) == text


@settings(deadline=None)
@given(data=st.data())
def test_decode_equals_the_tokenizers_package(
    tokenizer: Tokenizer, metadata: TokenizerMetadata, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, len(metadata.tokens) - 1)))
    decoder = tokenizers.decoders.ByteLevel()
    kept = [metadata.tokens[i] for i in ids if i > 2]
    assert tokenizer.decode(ids) == (decoder.decode(kept) if kept else "")


def test_control_tokens_in_text_become_their_ids(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>hello<|im_end|>")
    assert texts_of(tokenizer, ids) == ["<|im_start|>", "hello", "<|im_end|>"]
    assert tokenizer.decode(ids) == "hello"
    assert tokenizer.decode(ids, skip_special=False) == "<|im_start|>hello<|im_end|>"


def test_user_defined_tokens_are_text(make_metadata: Any) -> None:
    base = make_metadata()
    tokenizer = Tokenizer(
        make_metadata(tokens=(*base.tokens, "日 é", "éè"), token_types=(*base.token_types, 4, 4))
    )
    ids = tokenizer.encode("w日 éwéè")
    assert ids[1::2] == [len(base.tokens), len(base.tokens) + 1]
    assert tokenizer.decode(ids) == "w日 éwéè"


def test_ordinary_tokens_outside_the_byte_alphabet_are_text(make_metadata: Any) -> None:
    base = make_metadata()
    tokenizer = Tokenizer(
        make_metadata(tokens=(*base.tokens, "[日]"), token_types=(*base.token_types, 5))
    )
    assert tokenizer.decode([len(base.tokens)]) == "[日]"


def test_bos_is_added_once_and_only_if_asked(tokenizer: Tokenizer, make_metadata: Any) -> None:
    with_bos = Tokenizer(make_metadata(add_bos=True))
    plain = tokenizer.encode("hello")
    assert with_bos.encode("hello") == [1, *plain]
    assert with_bos.encode("<|im_start|>hello") == [1, *plain]
    assert with_bos.encode("") == [1]


def test_bytes_outside_the_vocabulary_are_dropped(make_metadata: Any) -> None:
    base = make_metadata()
    at = base.tokens.index("z")
    without_z = Tokenizer(
        make_metadata(
            tokens=base.tokens[:at] + base.tokens[at + 1 :],
            token_types=base.token_types[:at] + base.token_types[at + 1 :],
        )
    )
    assert without_z.decode(without_z.encode("wzw")) == "ww"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {0, 2}),
        ({"eos_id": None}, {0, 2}),
        ({"eos_id": 1}, {0, 1, 2}),
        ({"end_of_turn_id": 7}, {0, 2, 7}),
    ],
)
def test_eos_ids(make_metadata: Any, changes: dict[str, int | None], expected: set[int]) -> None:
    assert Tokenizer(make_metadata(**changes)).eos_ids == expected


def test_ordinary_tokens_that_look_like_an_end_are_not(make_metadata: Any) -> None:
    base = make_metadata()
    changed = make_metadata(token_types=(1, *base.token_types[1:]))
    assert Tokenizer(changed).eos_ids == {2}


@settings(deadline=None)
@given(text=st.text(), skip_special=st.booleans(), data=st.data())
def test_stream_equals_decode(
    tokenizer: Tokenizer, text: str, skip_special: bool, data: st.DataObject
) -> None:
    ids = tokenizer.encode(text)
    ids += data.draw(st.lists(st.integers(0, len(tokenizer.metadata.tokens) - 1)))
    stream = tokenizer.stream(skip_special)
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_special)


def test_stream_holds_back_incomplete_characters(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    pieces = [stream.push(token_id) for token_id in tokenizer.encode("w🤖é語")]
    assert pieces == ["w", "", "", "", "🤖", "é", "", "", "語"]
    assert stream.flush() == ""


def test_stream_flush_marks_an_incomplete_character_and_starts_again(
    tokenizer: Tokenizer,
) -> None:
    stream = tokenizer.stream()
    first, *_ = tokenizer.encode("🤖")
    assert stream.push(first) == ""
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"
    assert stream.flush() == ""
    assert stream.push(tokenizer.encode("w")[0]) == "w"


def test_numpy_ids(tokenizer: Tokenizer) -> None:
    ids = np.array(tokenizer.encode("hello é"), np.int32)
    assert tokenizer.decode(ids) == "hello é"
    assert tokenizer.stream().push(ids[0]) == "hello"


@pytest.mark.parametrize("token_id", [-1, 10_000])
def test_decode_refuses_ids_outside_the_vocabulary(tokenizer: Tokenizer, token_id: int) -> None:
    with pytest.raises(ValueError, match=f"token id {token_id} is outside the vocabulary of 267"):
        tokenizer.decode([token_id])


def test_chat_template(tokenizer: Tokenizer) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "w"}]
    turns = "<|im_start|>user:hello<|im_end|><|im_start|>assistant:w<|im_end|>"
    rendered = tokenizer.apply_chat_template(messages)
    assert rendered == turns + "<|im_start|>assistant:"
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=False) == turns
    assert texts_of(tokenizer, tokenizer.encode(rendered))[:6] == [
        *("<|im_start|>", "u", "s", "e", "r", ":")
    ]


def test_chat_template_errors(tokenizer: Tokenizer, make_metadata: Any) -> None:
    with pytest.raises(ValueError, match=r"message 1 lacks content; it has \['role'\]"):
        tokenizer.apply_chat_template([*MESSAGES, {"role": "user"}])
    with pytest.raises(ValueError, match="chat template failed: no tools here"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}])
    with pytest.raises(ValueError, match="has no chat template"):
        Tokenizer(make_metadata(chat_template=None)).apply_chat_template(MESSAGES)
    with pytest.raises(ValueError, match="chat template failed"):
        Tokenizer(make_metadata(chat_template="{% if %}")).apply_chat_template(MESSAGES)


@pytest.mark.parametrize(
    "template", ["{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}"]
)
def test_chat_template_is_sandboxed(make_metadata: Any, template: str) -> None:
    with pytest.raises(ValueError, match="unsafe"):
        Tokenizer(make_metadata(chat_template=template)).apply_chat_template(list(MESSAGES))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "unsupported tokenizer: model='llama'"),
        ({"token_types": (1,)}, "267 tokens but 1 types"),
        ({"tokens": ("a", "a"), "token_types": (1, 1)}, "the same token twice"),
        ({"eos_id": 267}, "eos_id is 267, outside the vocabulary of 267"),
        ({"padding_id": -1}, "padding_id is -1, outside"),
        ({"add_bos": True, "bos_id": None}, "asks for a BOS token but names none"),
    ],
)
def test_metadata_that_contradicts_itself(
    make_metadata: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        make_metadata(**changes)


@pytest.mark.parametrize("merge", ["h z", "hello", "q absent"])
def test_refuses_merges_outside_the_vocabulary(make_metadata: Any, merge: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"merge '{merge}'"):
        Tokenizer(make_metadata(merges=(merge,)))
