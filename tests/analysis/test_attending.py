"""Looking at attention and changing it, against transformers' own eager attention."""

from typing import Any

import pytest
import torch
import transformers

from qtool.analysis.attending import Attending
from qtool.errors import InputError

SMALL: dict[str, Any] = {
    "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20,
    "max_position_embeddings": 24, "initializer_range": 0.5, "pad_token_id": 0,
}  # fmt: skip
EACH = {
    "BertForSequenceClassification": {},
    "RobertaForSequenceClassification": {},
    "DistilBertForSequenceClassification": {},
    "GPT2LMHeadModel": {"bos_token_id": 1, "eos_token_id": 2},
    "OPTForCausalLM": {"ffn_dim": 20, "word_embed_proj_dim": 16},
    "LlamaForCausalLM": {"num_key_value_heads": 2},
    "MistralForCausalLM": {"num_key_value_heads": 2, "sliding_window": 4},
}


def build(architecture: str, **options: Any) -> Any:
    torch.manual_seed(0)
    cls = getattr(transformers, architecture)
    return cls(cls.config_class(**{**SMALL, **options})).eval()


@pytest.mark.parametrize("architecture", EACH)
def test_probabilities_are_those_of_eager_attention(architecture: str) -> None:
    model = build(architecture, **EACH[architecture])
    model.config.use_cache = False
    ids = torch.randint(3, 30, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    before = model.config._attn_implementation
    attending, seen = Attending(model), []
    assert model.config._attn_implementation == before
    assert len(attending.modules) == 2

    def look(path: str, probabilities: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
        seen.append((path, probabilities.clone(), exists.expand(2, 1, 9, 9)))
        return probabilities

    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask).logits
        with attending.changed(look, mask):
            looked = model(input_ids=ids, attention_mask=mask).logits
        model.set_attn_implementation("eager")
        theirs = model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    assert [path for path, *_ in seen] == attending.modules
    for (_, probabilities, exists), expected in zip(seen, theirs, strict=True):
        there = exists.expand_as(expected)
        torch.testing.assert_close(probabilities[there], expected[there])
        # What is said not to exist: rows of padding, and keys to which nobody gives anything.
        assert not exists[1, 0, 6:].any()
        assert (expected[:, :, :6][~there[:, :, :6]] == 0).all()
        assert exists[0].any(-1).all()
    kept = mask.bool() if plain.dim() == 3 else slice(None)
    torch.testing.assert_close(looked[kept], plain[kept], rtol=1e-4, atol=1e-5)


def test_changes_reach_the_output() -> None:
    model = build("BertForSequenceClassification")
    ids = torch.randint(3, 30, (1, 5), generator=torch.Generator().manual_seed(1))
    mask, attending = torch.ones_like(ids), Attending(model)

    def nothing(path: str, probabilities: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(probabilities)

    inside: list[torch.Tensor] = []
    for layer in model.bert.encoder.layer:
        layer.attention.self.register_forward_hook(lambda module, args, output: inside.append(output[0]))
    with torch.no_grad(), attending.changed(nothing, mask):
        model(input_ids=ids, attention_mask=mask)
    assert all(not context.any() for context in inside) and len(inside) == 2


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("GPTJForCausalLM", {"n_embd": 16, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
        ("DebertaV2ForSequenceClassification", {}),
        ("MPNetForSequenceClassification", {}),
    ],
)
def test_what_does_not_attend_through_the_registry_is_refused(architecture: str, options: Any) -> None:
    with pytest.raises(InputError, match=f"{architecture} does not attend through transformers' registry"):
        Attending(build(architecture, **options))


def test_cross_attention_is_refused() -> None:
    model = build("BertLMHeadModel", is_decoder=True, add_cross_attention=True)
    attending, ids = Attending(model), torch.full((1, 4), 5)
    other = torch.zeros(1, 7, 16)
    with (
        torch.no_grad(),
        attending.changed(lambda path, p, exists: p, torch.ones(1, 4)),
        pytest.raises(InputError, match="attends to another text"),
    ):
        model(input_ids=ids, encoder_hidden_states=other)
