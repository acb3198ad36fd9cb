"""What engines are given: shapes as they are written, batches of real texts, files of batches."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from qtool.bench import batches, shapes
from qtool.bench.shapes import Decoding, Fixed, Limits, Ragged
from qtool.errors import InputError, UsageError

LIMITS = Limits(vocabulary=65, positions=40, typed=True)


def test_shapes_as_they_are_written() -> None:
    found = shapes.parse("1x32, 8x128,sst2:32,4@128")
    assert found == [Fixed(1, 32), Fixed(8, 128), Ragged("sst2", 32), Decoding(4, 128)]
    assert [shape.name for shape in found] == ["1x32", "8x128", "sst2:32", "4@128"]


@pytest.mark.parametrize(
    "text", ["", "x", "0x8", "8x0", "8", "8x", "-1x8", "8x8x8", "1x8,", "sst2:0", "sst2:", "8X8", "1@0", "0@8", "@8"]
)
def test_what_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no shape"):
        shapes.parse(text)


def test_unknown_tasks_and_doubles_are_refused() -> None:
    with pytest.raises(UsageError, match="sst2"):
        shapes.parse("sst3:8")
    with pytest.raises(UsageError, match="1x8 is there twice"):
        shapes.parse("1x8,2x8,1x8")


def test_random_ids_depend_on_the_seed_alone() -> None:
    one, again, other = (shapes.fixed(Fixed(3, 40), LIMITS, seed).batches[0] for seed in (1, 1, 2))
    assert set(one) == {"input_ids", "attention_mask", "token_type_ids"}
    np.testing.assert_array_equal(one["input_ids"], again["input_ids"])
    assert (one["input_ids"] != other["input_ids"]).any()
    assert one["input_ids"].shape == (3, 40) and one["input_ids"].min() >= 32 and one["input_ids"].max() < 65
    assert one["attention_mask"].all() and not one["token_type_ids"].any()


def test_more_tokens_than_positions_are_refused() -> None:
    with pytest.raises(InputError, match="40 positions"):
        shapes.fixed(Fixed(1, 41), LIMITS, 0)


def test_limits_are_the_least_of_all_models() -> None:
    small = transformers.BertConfig(vocab_size=50, max_position_embeddings=64)
    roberta = transformers.RobertaConfig(vocab_size=90, max_position_embeddings=34, type_vocab_size=1, pad_token_id=1)
    assert shapes.limits_of({"a": small, "b": roberta}) == Limits(50, 32, False)
    assert shapes.limits_of({"a": small}) == Limits(50, 64, True)


def test_decoding_is_for_causal_models_with_room_for_one_more() -> None:
    llama = transformers.LlamaConfig(architectures=["LlamaForCausalLM"], vocab_size=65, max_position_embeddings=40)
    bert = transformers.BertConfig(architectures=["BertForMaskedLM"], vocab_size=65)
    limits = shapes.limits_of({"a": llama})
    made = shapes.decoding(Decoding(2, 39), limits, 0)
    assert (made.name, made.context, made.batches[0]["input_ids"].shape) == ("2@39", 39, (2, 40))
    assert (made.sequences, made.tokens) == (2, 2)
    with pytest.raises(InputError, match="40 positions"):
        shapes.decoding(Decoding(1, 40), limits, 0)
    with pytest.raises(InputError, match="shape 1@8 is for causal language models"):
        shapes.decoding(Decoding(1, 8), shapes.limits_of({"a": llama, "b": bert}), 0)


def test_texts_keep_their_order_and_are_padded_to_the_longest_of_their_batch(tiny: Any, zoo: Any) -> None:
    draw = random.Random(3)
    texts = [" ".join(f"w{draw.randrange(60)}" for _ in range(draw.randint(1, 20))) for _ in range(11)]
    zoo.write("data/validation.jsonl", texts, [0] * 11)
    found = shapes.ragged(Ragged("sst2", 4), tiny.model, LIMITS, str(zoo.folder / "data"), 16, None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.model)
    alone = [tokenizer(text, truncation=True, max_length=16)["input_ids"] for text in texts]
    assert [len(batch["input_ids"]) for batch in found.batches] == [4, 4, 3]
    for start, batch in zip((0, 4, 8), found.batches, strict=True):
        rows = alone[start : start + 4]
        width = max(map(len, rows))
        assert batch["input_ids"].tolist() == [row + [0] * (width - len(row)) for row in rows]
        assert batch["attention_mask"].tolist() == [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    assert (found.sequences, found.tokens) == (11, sum(map(len, alone)))
    assert found.padded_tokens == sum(len(b) * max(map(len, b)) for b in (alone[:4], alone[4:8], alone[8:]))


def test_only_the_first_texts_where_there_is_a_limit(tiny: Any) -> None:
    found = shapes.ragged(Ragged("sst2", 4), tiny.model, LIMITS, str(tiny.data), None, 5)
    assert [len(batch["input_ids"]) for batch in found.batches] == [4, 1]


def test_texts_of_another_vocabulary_are_refused(tiny: Any) -> None:
    with pytest.raises(InputError, match="compare those models apart"):
        shapes.ragged(Ragged("sst2", 4), tiny.model, Limits(8, 40, True), str(tiny.data), None, None)


def test_samples_are_apart_and_random_without_a_tokenizer(tiny: Any, zoo: Any) -> None:
    real = shapes.samples(tiny.model, LIMITS, 16, 0)
    assert real.check.ragged and real.check.sequences == real.calibration.sequences == 64
    bare = shapes.samples(zoo.make("bare", words=None), LIMITS, 16, 0)
    assert not bare.check.ragged
    assert (bare.check.batches[0]["input_ids"] != bare.calibration.batches[0]["input_ids"]).any()


def test_files_hold_what_was_written(tmp_path: Path) -> None:
    made = [shapes.fixed(Fixed(2, tokens), LIMITS, 0).batches[0] for tokens in range(1, 13)]
    batches.write(batches.Workload("sst2:2", made, ragged=True, context=3), tmp_path / "file")
    found = batches.read(tmp_path / "file")
    assert (found.name, found.ragged, found.context, len(found.batches)) == ("sst2:2", True, 3, 12)
    for one, other in zip(made, found.batches, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
