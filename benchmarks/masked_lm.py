"""How often a quantized masked language model proposes the same words as its float parent.

    python benchmarks/masked_lm.py ENCODER TEXT.txt [--method ibert] [--texts 200] [--json FILE]

Makes masked-LM checkpoints of a BERT encoder (a folder): as BERT and as RoBERTa, with an identity transform and the
word table as tied head, and a random BERT of the same shape. Each is quantized; one token in seven of the first
paragraphs of the text file is masked, and the five most likely words of both models are compared.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

import qtool

EVERY, TOKENS, TOP = 7, 128, 5


def as_bert(encoder: Any) -> Any:
    """The encoder as BertForMaskedLM."""
    model = BertForMaskedLM(encoder.config)
    missing = model.bert.load_state_dict(encoder.state_dict(), strict=False)
    assert not missing.missing_keys
    head = model.cls.predictions.transform
    return _identity(model, head.dense, head.LayerNorm, model.cls.predictions.bias)


def as_roberta(encoder: Any) -> Any:
    """The same function as RobertaForMaskedLM: one token type, and positions that start behind the padding index."""
    old = encoder.config
    config = RobertaConfig(
        vocab_size=old.vocab_size, hidden_size=old.hidden_size, num_hidden_layers=old.num_hidden_layers,
        num_attention_heads=old.num_attention_heads, intermediate_size=old.intermediate_size, type_vocab_size=1,
        max_position_embeddings=old.max_position_embeddings + old.pad_token_id + 1, pad_token_id=old.pad_token_id,
        layer_norm_eps=old.layer_norm_eps, hidden_act=old.hidden_act,
    )  # fmt: skip
    model = RobertaForMaskedLM(config)
    state = {name: value for name, value in encoder.state_dict().items() if not name.startswith("pooler.")}
    positions = model.roberta.embeddings.position_embeddings.weight.detach().clone()
    positions[old.pad_token_id + 1 :] = state["embeddings.position_embeddings.weight"]
    state["embeddings.position_embeddings.weight"] = positions
    state["embeddings.token_type_embeddings.weight"] = state["embeddings.token_type_embeddings.weight"][:1]
    assert not model.roberta.load_state_dict(state, strict=False).missing_keys
    return _identity(model, model.lm_head.dense, model.lm_head.layer_norm, model.lm_head.bias)


def _identity(model: Any, dense: Any, norm: Any, bias: Any) -> Any:
    with torch.no_grad():
        dense.weight.copy_(torch.eye(len(dense.weight)))
        for zero in (dense.bias, norm.bias, bias):
            zero.zero_()
        norm.weight.fill_(1)
    return model.eval()


def masked(tokenizer: Any, text: Path, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids `[1, tokens]` of paragraphs, and which of them are masked."""
    lines = [line for line in text.read_text("utf-8").splitlines() if len(line) > 200][:count]
    for number, line in enumerate(lines):
        ids = tokenizer(line, truncation=True, max_length=TOKENS, return_tensors="pt").input_ids
        hidden = torch.zeros_like(ids, dtype=torch.bool)
        hidden[:, 1 + number % EVERY : -1 : EVERY] = True
        yield ids.masked_fill(hidden, tokenizer.mask_token_id), hidden


def compare(folder: Path, method: str, tokenizer: Any, text: Path, count: int) -> dict[str, float]:
    """Agreement on masked tokens in percent: the first word, and the words of both top fives."""
    quantized = qtool.quantize(str(folder), method=method, output=folder.with_name(f"{folder.name}-q")).path
    models = [AutoModelForMaskedLM.from_pretrained(path).eval() for path in (folder, quantized)]
    tokens = first = shared = 0
    with torch.inference_mode():
        for ids, hidden in masked(tokenizer, text, count):
            theirs, own = (model(ids).logits[hidden].topk(TOP).indices for model in models)
            tokens += len(own)
            first += int((theirs[:, 0] == own[:, 0]).sum())
            shared += int((theirs[:, :, None] == own[:, None, :]).sum())
    return {"tokens": tokens, "top_1_percent": 100 * first / tokens, "top_5_percent": 100 * shared / (TOP * tokens)}


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("encoder", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--method", default="ibert")
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--json", type=Path)
    wanted = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    encoder, tokenizer = AutoModel.from_pretrained(wanted.encoder), AutoTokenizer.from_pretrained(wanted.encoder)
    torch.manual_seed(0)
    models = {"bert": as_bert(encoder), "roberta": as_roberta(encoder), "random": BertForMaskedLM(encoder.config)}
    found: dict[str, Any] = {"method": wanted.method, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as scratch:
        for name, model in models.items():
            folder = Path(scratch) / name
            model.save_pretrained(folder)
            for file in wanted.encoder.glob("*token*"):
                shutil.copy(file, folder)
            for file in wanted.encoder.glob("vocab*"):
                shutil.copy(file, folder)
            found[name] = compare(folder, wanted.method, tokenizer, wanted.text, wanted.texts)
    text = json.dumps(found, indent=2)
    print(text)
    if wanted.json:
        wanted.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
