"""How torch runs a model: what it is fed, what a cache changes, and which bytes are read."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from qtool.bench.products import products_of
from qtool.bench.runtimes import Facts, Request
from qtool.bench.runtimes import torch as runtime
from qtool.bench.runtimes.torch import TorchRunner, fixed
from qtool.bench.runtimes.weights import read_bytes, state_bytes

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 66,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, num_key_value_heads=2, pad_token_id=0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.config.use_cache = False
    return model


def ids(*shape: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    return np.random.default_rng(0).integers(5, 100, shape)


@pytest.mark.parametrize("static", [False, True])
def test_a_token_behind_a_cache_is_the_last_of_the_whole(llama: Any, static: bool) -> None:
    """Over several calls: what one adds to the cache, the next does not see."""
    batch = {"input_ids": ids(2, 9), "attention_mask": np.ones((2, 9), dtype=np.int64)}
    with torch.inference_mode():
        whole = llama(input_ids=torch.from_numpy(batch["input_ids"])).logits[:, -1:]
    runner = TorchRunner(llama, Facts("torch", 1, 1), CPU, static_cache=static)
    feed = runner.feed(batch, context=8)
    for _ in range(3):
        runner.ready(feed)
        outputs, _ = runner.run(feed)
        torch.testing.assert_close(outputs.logits, whole)
    assert int(feed.inputs["past_key_values"].get_seq_length()) == 9
    runner.ready(feed)
    assert int(feed.inputs["past_key_values"].get_seq_length()) == 8


def test_a_batch_without_padding_is_fed_as_it_is_and_without_a_mask() -> None:
    whole = {"input_ids": torch.ones(2, 5, dtype=torch.int64), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    assert list(fixed(whole, 0, None)) == ["input_ids"]
    assert fixed(whole, 0, None)["input_ids"] is whole["input_ids"]


def test_a_padded_batch_is_padded_on_to_a_few_widths() -> None:
    padded = {"input_ids": torch.full((2, 33), 7), "attention_mask": torch.ones(2, 33, dtype=torch.int64)}
    padded["attention_mask"][1, 30:] = 0
    found = fixed(padded, 1, None)
    assert found["input_ids"].shape == found["attention_mask"].shape == (2, 64)
    assert torch.equal(found["input_ids"][:, :33], padded["input_ids"]) and bool(
        (found["input_ids"][:, 33:] == 1).all()
    )
    assert int(found["attention_mask"].sum()) == int(padded["attention_mask"].sum())
    assert fixed(padded, 1, 40)["input_ids"].shape == (2, 40)
    left = {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"].flip(1)}
    assert fixed(left, 1, None) is left


@pytest.mark.parametrize(
    "kind", ["BertForTokenClassification", "BertForQuestionAnswering", "BertForSequenceClassification"]
)
def test_further_padding_changes_no_output(kind: str) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.BertConfig(**SHAPE)).eval()
    batch = {"input_ids": ids(3, 11), "attention_mask": np.ones((3, 11), dtype=np.int64)}
    batch["attention_mask"][1, 6:] = 0
    plain, compiled = (TorchRunner(model, Facts("torch", 1, 1), CPU, wide, 66) for wide in (False, True))
    want, have = (runner.arrays(runner.run(runner.feed(batch))) for runner in (plain, compiled))
    assert compiled.feed(batch).inputs["input_ids"].shape == (3, 32)
    real = batch["attention_mask"].astype(bool)
    for name, value in want.items():
        assert have[name].shape == value.shape
        rows = real if value.shape[:2] == real.shape else slice(None)
        np.testing.assert_allclose(have[name][rows], value[rows], atol=1e-6)


def test_a_forward_reads_no_table_but_one_that_is_its_head(llama: Any) -> None:
    assert read_bytes(torch.nn.Sequential(torch.nn.Embedding(100, 8), torch.nn.Linear(8, 3))) == 4 * (8 * 3 + 3)
    tied = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SHAPE, num_key_value_heads=2, tie_word_embeddings=True)
    )
    assert read_bytes(tied) == 4 * sum(value.numel() for value in tied.parameters())
    assert read_bytes(llama) == read_bytes(tied)  # not tied: the table is not read, the head is


@pytest.mark.parametrize("method", ["zeroquant", "ibert"])
def test_an_artifact_reads_its_codes(tiny: Any, desk: Path, method: str) -> None:
    import qtool

    out = Path(qtool.quantize(str(tiny.model), method=method, output=desk / method).path)
    model = runtime.load_model(out)
    held = {name: value.nbytes for name, value in model.state_dict().items()}
    tables = sum(size for name, size in held.items() if re.search(r"embeddings\.(word|position|token_type)", name))
    assert 0 < tables < sum(held.values()) / 2
    assert read_bytes(model) == sum(held.values()) - tables
    assert products_of(out) == products_of(tiny.model)


def test_torchao_runs_in_int8(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products, without the minutes of a compiler."""
    if find_spec("torchao") is None:
        pytest.skip("torchao not installed (extra 'bench')")
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    found = {
        engine: runtime.load(Request(engine, tiny.model, 1, tmp_path, ["input_ids"], tmp_path / "none", 66))
        for engine in ("torch", "torchao")
    }
    batch = {"input_ids": ids(2, 8) % 40 + 5, "attention_mask": np.ones((2, 8), dtype=np.int64)}
    want, have = (runner.arrays(runner.run(runner.feed(batch)))["logits"] for runner in found.values())
    assert 0 < np.abs(want - have).max() < 0.2 * np.abs(want).max()
    own, theirs = (runner.facts for runner in (found["torchao"], found["torch"]))
    assert own.version.startswith("torchao ") and own.details["compiled"] == "default"
    assert own.read_bytes is not None and theirs.read_bytes is not None
    assert theirs.read_bytes / 4 < own.read_bytes < theirs.read_bytes / 2
    assert own.size_bytes == state_bytes(found["torchao"].model)
