from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertConfig, RobertaConfig, T5Config

from qtool.errors import InputError
from qtool.evaluation.batches import collate, cut, encode, longest
from qtool.evaluation.models import load_tokenizer


@pytest.fixture
def own(zoo: Any) -> Any:
    return load_tokenizer(zoo.make("m"))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=50), st.integers(1, 9))
def test_batches_hold_every_row_once_and_sorted(lengths: list[int], size: int) -> None:
    batches = cut([{"input_ids": [1] * length} for length in lengths], size)
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths)
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)


@pytest.mark.parametrize(
    ("config", "asked", "limit"),
    [
        (BertConfig(max_position_embeddings=512), 128, 128),
        (BertConfig(max_position_embeddings=512), None, 512),
        (BertConfig(max_position_embeddings=40), 128, 40),
        (RobertaConfig(max_position_embeddings=514, pad_token_id=1), None, 512),
        (RobertaConfig(max_position_embeddings=513, pad_token_id=0), 600, 512),
    ],
)
def test_the_model_limits_the_length(own: Any, config: Any, asked: int | None, limit: int) -> None:
    assert longest(config, own, asked) == limit


def test_the_tokenizer_limits_the_length(own: Any) -> None:
    own.model_max_length = 20
    assert longest(BertConfig(), own, 128) == 20
    own.model_max_length = int(1e30)
    assert longest(T5Config(), own, None) is None


def test_encoding_is_that_of_the_tokenizer(own: Any) -> None:
    config = BertConfig(vocab_size=65)
    rows = encode(own, config, ["w0 w1", "w2"], 8, "m")
    assert [row["input_ids"] for row in rows] == [own("w0 w1")["input_ids"], own("w2")["input_ids"]]
    pairs = encode(own, config, [("w0 w1 w2 w3", "w4 w5 w6 w7")], 7, "m")
    expected = own("w0 w1 w2 w3", "w4 w5 w6 w7", truncation=True, max_length=7)
    assert pairs[0]["input_ids"] == expected["input_ids"] and len(pairs[0]["input_ids"]) == 7
    assert pairs[0]["token_type_ids"] == expected["token_type_ids"] and 1 in pairs[0]["token_type_ids"]


def test_a_model_without_token_types_gets_none(own: Any) -> None:
    (row,) = encode(own, RobertaConfig(vocab_size=65, type_vocab_size=1), [("w0", "w1")], 8, "m")
    assert set(row) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(("text", "least"), [("w0 w1 w2", 3), (("w0 w1", "w2"), 4)])
def test_a_length_without_room_for_text_is_refused(own: Any, text: Any, least: int) -> None:
    for length in range(1, least):
        with pytest.raises(InputError, match=f"maximum length of {length} leaves no room .* at least {least}"):
            encode(own, BertConfig(vocab_size=65), [text], length, "m")
    (row,) = encode(own, BertConfig(vocab_size=65), [text], least, "m")
    assert len(row["input_ids"]) == least


def test_a_foreign_tokenizer_is_refused(own: Any) -> None:
    with pytest.raises(InputError, match="does not belong to it: it gives token 64, the model knows 60"):
        encode(own, BertConfig(vocab_size=60), ["w59"], 8, "m")


def test_a_text_without_tokens_is_refused(zoo: Any) -> None:
    bare = AutoTokenizer.from_pretrained(zoo.make("m"))
    bare.backend_tokenizer.post_processor = None
    with pytest.raises(InputError, match="no tokens of row 2"):
        encode(bare, BertConfig(vocab_size=65), ["w1", ""], 8, "m")


def test_padding(own: Any) -> None:
    batch = collate(own, encode(own, BertConfig(vocab_size=65), ["w0 w1 w2", "w3"], 8, "m"))
    assert batch["input_ids"].tolist() == [[2, 5, 6, 7, 3], [2, 8, 3, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
