"""Operations of matrix products, against torch's own count of a real forward, and by hand."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from qtool.bench.batches import Workload
from qtool.bench.products import Products, counted
from qtool.pruning import shrink

SMALL = {"vocab_size": 100, "max_position_embeddings": 66}
BERT = {**SMALL, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
DISTIL = {**SMALL, "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 80}


def on_meta(config: Any, kind: str) -> Any:
    with torch.device("meta"):
        return getattr(transformers, kind)(config).eval()


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (transformers.BertConfig(**BERT), "BertForSequenceClassification"),
        (transformers.RobertaConfig(**BERT), "RobertaForSequenceClassification"),
        (transformers.RobertaConfig(**BERT), "RobertaForMaskedLM"),
        (transformers.ElectraConfig(**BERT, embedding_size=32), "ElectraForTokenClassification"),
        (transformers.DistilBertConfig(**DISTIL), "DistilBertForQuestionAnswering"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_encoders_against_torchs_counter(config: Any, kind: str) -> None:
    config._attn_implementation = "eager"
    model, batch, tokens = getattr(transformers, kind)(config).eval(), 3, 17
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.full((batch, tokens), 7))
    assert batch * counted(on_meta(config, kind)).operations(tokens) == counter.get_total_flops()


def test_a_bert_by_hand() -> None:
    found = counted(on_meta(transformers.BertConfig(**BERT, num_labels=3), "BertForSequenceClassification"))
    assert found == Products(2 * (4 * 48 * 48 + 2 * 48 * 80), 48 * 48 + 3 * 48, (48, 48))
    assert found.operations(5) == 2 * (5 * found.per_token + found.per_text + 2 * (48 + 48) * 25)


def test_a_decoder_counts_only_what_a_token_may_see() -> None:
    config = transformers.LlamaConfig(**BERT, num_key_value_heads=2, head_dim=16)
    found = counted(on_meta(config, "LlamaForCausalLM"))
    width = 4 * 16
    block = 48 * width + 2 * 48 * 32 + width * 48 + 3 * 48 * 80  # queries; keys and values; output; feed-forward
    assert found == Products(2 * block + 48 * 100, 0, (width, width), causal=True)
    assert found.operations(4) == 2 * (4 * found.per_token + 2 * 2 * width * (1 + 2 + 3 + 4))
    assert found.operations(1, context=9) == 2 * (found.per_token + 2 * 2 * width * 10)
    assert found.operations(10) == found.operations(9) + found.operations(1, context=9)


def test_fused_and_transposed_layers() -> None:
    config = transformers.GPT2Config(vocab_size=100, n_embd=48, n_layer=1, n_head=4, n_positions=66)
    found = counted(on_meta(config, "GPT2LMHeadModel"))
    assert found == Products(12 * 48 * 48 + 48 * 100, 0, (48,), causal=True)


def test_a_window_bounds_what_is_seen() -> None:
    found = Products(0, 0, (1,), causal=True, window=3)
    assert found.operations(5) == 4 * (1 + 2 + 3 + 3 + 3)
    config = transformers.MistralConfig(**BERT, num_key_value_heads=2, sliding_window=7)
    assert counted(on_meta(config, "MistralForCausalLM")).window == 7


def test_removed_heads_take_nothing() -> None:
    model = on_meta(transformers.BertConfig(**BERT), "BertModel")
    whole = counted(model)
    shrink(model, {1: [0, 2, 3]})
    pruned = counted(model)
    assert pruned.widths == (48, 12)
    assert whole.per_token - pruned.per_token == 4 * 36 * 48


def test_padding_and_what_a_cache_holds_take_nothing() -> None:
    found = Products(10, 100, (3,), causal=True)
    mask = np.array([[1, 1, 0], [1, 1, 1]])
    ragged = Workload("t:2", [{"attention_mask": mask}], ragged=True)
    assert found.of(ragged) == found.operations(2) + found.operations(3)
    cached = Workload("2@2", [{"attention_mask": np.ones((2, 3), dtype=np.int64)}], context=2)
    assert found.of(cached) == 2 * found.operations(1, context=2)
    assert (cached.sequences, cached.tokens, cached.padded_tokens) == (2, 2, 2)
