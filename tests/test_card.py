"""The model card, read back by the hub's own library."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results

from qtool import card

Command = Callable[..., Any]


def score(**changes: Any) -> dict[str, Any]:
    """An evaluation as `to_json` writes it."""
    return {
        "task": "sst2",
        "split": "validation",
        "data": "nyu-mll/glue/sst2",
        "n": 872,
        "metric": "accuracy",
        "candidate": {"model": "/home/someone/out", "score": 91.17123456, "quantized": True},
        "baseline": {"model": "/home/someone/float", "score": 91.4},
        "drop": 0.22876544,
        "interval": {"level": 0.95, "low": -0.4, "high": 0.9},
        "agreement": 99.2,
        "kl": 0.00123456,
        **changes,
    }


def report(**changes: Any) -> dict[str, Any]:
    kept = {f"bert.encoder.layer.{index}.output.LayerNorm": "normalisation" for index in range(12)}
    return {
        "source": {"name": "some-org/some-model", "revision": None, "bytes": 4_000_000},
        "recipe": {"methods": [{"name": "zeroquant"}]},
        "head": "sequence-classification",
        "modules": {"a": {"type": "linear", "weights": "int8:channel:sym", "activations": "int8:token:sym"}},
        "kept_float": {**kept, "classifier": "head: small"},
        "calibration": None,
        "execution": {"arithmetic": "int8 x int8 -> int32"},
        **changes,
    }


def header(text: str) -> dict[str, Any]:
    return dict(yaml.safe_load(text.split("---\n")[1]))


def rendered(tmp_path: Path, **changes: Any) -> tuple[dict[str, Any], str]:
    """The header as the hub's library reads it, and the whole text."""
    path = tmp_path / "README.md"
    path.write_text(card.render(report(**changes), 1_000_000, "methods: [zeroquant]"))
    loaded = metadata_load(path)
    assert loaded == header(path.read_text())
    return dict(loaded), path.read_text()


def test_scores_are_a_model_index_that_the_hub_reads(tmp_path: Path) -> None:
    lm = score(task="perplexity", metric="perplexity", data="wikitext", split="test", drop=0.31)
    lm["candidate"] = {"score": 25.3, "metrics": {"other": None, "bits": 1.5}}
    lost = score(task="cola", metric="matthews", candidate={"score": None}, interval=None, agreement=None, kl=None)
    found, text = rendered(tmp_path, scores=[score(), lm | {"interval": None, "agreement": None, "kl": 12.34}, lost])
    assert found["base_model"] == "some-org/some-model"
    assert found["base_model_relation"] == "quantized"
    assert found["library_name"] == "transformers"
    name, results = model_index_to_eval_results(found["model-index"])
    assert name == "some-model-zeroquant"
    assert [(r.metric_type, r.metric_value, r.dataset_type, r.dataset_split, r.task_type) for r in results] == [
        ("accuracy", 91.1712, "nyu-mll/glue/sst2", "validation", "text-classification"),
        ("perplexity", 25.3, "perplexity", "test", "text-classification"),
        ("bits", 1.5, "perplexity", "test", "text-classification"),
    ], "a score that is no number is no result"
    assert ModelCard(text).data.to_dict()["model-index"] == found["model-index"]
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[2:] == [
        "| sst2 | validation | 872 | accuracy, points of 100 | 91.40 | 91.17 | +0.23 [-0.40, +0.90] | 99.20 "
        "| 0.00123 |",
        "| perplexity | test | 872 | perplexity | 91.40 | 25.30 | +0.31 % | - | 12.3 |",
        "| cola | validation | 872 | matthews, points of 100 | 91.40 | - | +0.23 | - | - |",
    ]


@pytest.mark.parametrize(
    "data",
    ["/home/someone/d/validation.jsonl", "d/validation.jsonl", "../x/y", "C:\\x\\y.csv", "a/b.parquet", "", None],
)
def test_local_data_is_named_by_its_task(data: str | None, tmp_path: Path) -> None:
    found, text = rendered(tmp_path, scores=[score(data=data)])
    (result,) = model_index_to_eval_results(found["model-index"])[1]
    assert (result.dataset_type, result.dataset_name) == ("sst2", "sst2")
    assert not data or data not in text
    assert "someone" not in text


def test_without_scores_there_is_no_index(tmp_path: Path) -> None:
    found, text = rendered(tmp_path)
    assert "model-index" not in found and "Scores" not in text


def test_what_stays_float_is_grouped_by_its_reason(tmp_path: Path) -> None:
    text = rendered(tmp_path)[1]
    assert "- normalisation: 12 × `bert.encoder.layer.*.output.LayerNorm`\n- head: small: `classifier`\n" in text


SOURCE = """---
license: other
license_name: thing
license_link: LICENSE
language: [en, de]
pipeline_tag: feature-extraction
base_model: {base}
tags: [private-tag]
secret: 1
---
# A model
"""


@pytest.mark.parametrize(
    ("base", "kept"),
    [
        ("an-org/base", "an-org/base"),
        ("/home/someone/run1", None),
        ("./run1", None),
        ("[bert-base-cased]", "bert-base-cased"),
    ],
)
def test_a_local_source_hands_on_its_license(base: str, kept: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "private" / "model"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(SOURCE.format(base=base))
    found, text = rendered(tmp_path, source={"name": str(folder), "bytes": 4_000_000})
    assert found["license"] == "other" and found["license_name"] == "thing" and found["license_link"] == "LICENSE"
    assert found["language"] == ["en", "de"] and found["pipeline_tag"] == "feature-extraction"
    assert (found.get("base_model"), found.get("base_model_relation")) == (kept, "quantized" if kept else None)
    for private in ("private", "someone", "run1", "secret", str(tmp_path)):
        assert private not in text


def test_a_hub_source_hands_on_its_license_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "cached.md"
    cached.write_text(SOURCE.format(base="an-org/base"))
    asked = []
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: asked.append((a, k)) or str(cached))
    found, _ = rendered(tmp_path, source={"name": "o/m", "revision": "v2", "bytes": 1})
    assert asked == [(("o/m", "README.md"), {"revision": "v2"})]
    assert found["license"] == "other" and found["base_model"] == "o/m", "of two candidates, the one that was quantized"


BAD = {
    "not yaml": "---\n: : :\n  - x\n---\n", "a list": "---\n- a\n---\n", "no header": "text",
    "open": "---\nlicense: x\n",
    "wrong types": "---\nlicense: 3\nlanguage: {a: b}\npipeline_tag: [1]\nbase_model: [{}]\n---\n",
    "not text": b"---\n\xff\xfe\n---\n", "deep": "---\na: " + "[" * 2000 + "\n---\n", "a constructor":
    "---\nlicense: !!python/object/apply:os.system ['true']\n---\n", "a bad date": "---\nlicense: 2020-13-45\n---\n",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_header_is_passed_over(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    content = BAD[name]
    (folder / "README.md").write_bytes(content if isinstance(content, bytes) else content.encode())
    found, _ = rendered(tmp_path, source={"name": str(folder), "bytes": 1})
    assert set(found) == {"library_name", "tags", "pipeline_tag"}
    assert found["pipeline_tag"] == "text-classification", "what the head says"


def test_a_card_is_written_again_with_the_scores(tiny: Any, desk: Path, qtool_command: Command) -> None:
    """First the same bytes; with scores, more; and what came from the source survives the source."""
    source = desk / "hidden-place" / "tiny"
    source.parent.mkdir()
    shutil.copytree(tiny.model, source)
    (source / "README.md").write_text(SOURCE.format(base="an-org/base"))
    data = shutil.copytree(tiny.data, desk / "hidden-data")
    ended = qtool_command(
        "quantize", source, "-c", "zeroquant-w8a8-static", "--task", "sst2", "--data", data, "-o", "out", "-q"
    )
    assert ended.code == 0, ended.err
    before = Path("out/README.md").read_bytes()
    card.write(Path("out"))
    assert Path("out/README.md").read_bytes() == before
    shutil.rmtree(source.parent)
    record = json.loads(Path("out/qtool.json").read_text())
    result = score(data=str(data / "validation.jsonl"))
    Path("out/qtool.json").write_text(json.dumps({**record, "scores": [result]}))
    card.write(Path("out"))
    text = Path("out/README.md").read_text()
    found = header(text)
    assert found["license"] == "other" and found["base_model"] == "an-org/base"
    assert found["model-index"][0]["results"][0]["metrics"][0]["value"] == 91.1712
    for private in ("hidden", str(desk), "someone"):
        assert private not in text
    texts = [json.loads(line)["sentence"] for line in (tiny.data / "train.jsonl").read_text().splitlines()]
    assert not any(sentence in text for sentence in texts if len(sentence) > 12)
    recipe = re.search(r"```yaml\n(.*?)```", text, re.S)
    assert recipe and yaml.safe_load(recipe[1])["methods"] == [{"name": "zeroquant"}]
