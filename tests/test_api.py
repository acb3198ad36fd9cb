"""What the command line does for a user, from Python: findings of a reader who tried to break it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import qtool
from qtool import api
from qtool.errors import InputError

RANDOM = ("calibration.source=random", "calibration.num_samples=4", "calibration.max_length=8")


@pytest.fixture
def model(zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder: Path = zoo.make("float", labels=("bad", "good"))
    return folder


@pytest.fixture(autouse=True)
def no_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The golden check has tests of its own; here it would cost seconds each time."""
    monkeypatch.setattr("qtool.pipeline._check_in_fresh_process", lambda *args: None)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("out", [".", "../{name}", "float", "./float/../float"])
def test_the_source_is_never_overwritten(model: Path, out: str) -> None:
    before = contents(model)
    with pytest.raises(InputError, match="choose another -o"):
        qtool.quantize("float", method="zeroquant", output=out.format(name=model.parent.name), overwrite=True)
    assert contents(model) == before


def test_a_folder_of_something_else_is_never_overwritten(model: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds something else"):
        qtool.quantize("float", method="zeroquant", output="thesis", overwrite=True)
    assert contents(tmp_path / "thesis") == {"chapter1.tex": b"years of work"}


def test_an_artifact_is_overwritten_and_sizes_are_right(model: Path) -> None:
    first = qtool.quantize("float", method="zeroquant", output="out", set=RANDOM)
    second = qtool.quantize("float", method="zeroquant", output="out", set=RANDOM, overwrite=True)
    size = (model / "model.safetensors").stat().st_size
    assert first.source_bytes == second.source_bytes == size > first.size_bytes == second.size_bytes


def test_nothing_to_quantize_is_an_error(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leaves every module in float"):
        qtool.quantize("float", method="zeroquant", output="out", set=[*RANDOM, 'rules={"*": float}'])
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.qtool-run").exists()


def test_a_model_without_integer_products_does_not_claim_them(model: Path, tmp_path: Path) -> None:
    qtool.quantize("float", method="zeroquant", output="out", set=[*RANDOM, 'rules={"*.layer.*": float}'])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "products are computed in float" in card and "int8 × int8" not in card


def test_the_artifact_holds_nobodys_sentences(model: Path, zoo: Any, tmp_path: Path) -> None:
    """The golden batch is made of qtool's own sentences, and the card names no folder."""
    zoo.write("data/train.jsonl", zoo.sentences(20), [0, 1] * 10)
    made = qtool.quantize("float", method="zeroquant", output="out", task="sst2", data="data", num_samples=8)
    golden = json.loads((made.path / "qtool.json").read_text())["golden"]["inputs"]["input_ids"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    own = tokenizer(list(api.calibration_texts(api.resolve_recipe(methods=["zeroquant"]))[0][:4]), padding=True)
    assert [row[:8] for row in golden] == [row[:8] for row in own["input_ids"]]
    assert str(tmp_path) not in (made.path / "README.md").read_text()


def test_an_untied_head_survives(zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A masked-LM checkpoint whose output layer is not its word table although the config says so."""
    from safetensors.torch import load_file, save_file

    monkeypatch.chdir(tmp_path)
    folder = zoo.make("mlm", "BertForMaskedLM")
    tensors = load_file(folder / "model.safetensors")
    shape = tensors["bert.embeddings.word_embeddings.weight"].shape
    tensors["cls.predictions.decoder.weight"] = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    qtool.quantize("mlm", method="zeroquant", output="out", set=RANDOM)
    ids = torch.randint(5, 20, (2, 8), generator=torch.Generator().manual_seed(1))
    exact, found = (
        transformers.AutoModelForMaskedLM.from_pretrained(path).eval()(ids).logits.flatten() for path in (folder, "out")
    )
    assert torch.corrcoef(torch.stack([exact, found]))[0, 1] > 0.99


def test_arguments_are_checked(model: Path) -> None:
    with pytest.raises(TypeError, match="did you mean num_samples"):
        qtool.quantize("float", method="zeroquant", num_sample=3)


def test_evaluate_finds_the_recorded_source(model: Path, zoo: Any, tmp_path: Path) -> None:
    texts = zoo.sentences(30)
    labels = zoo.plain(model, texts).argmax(-1).tolist()
    zoo.write("data/validation.jsonl", texts, [("bad", "good")[label] for label in labels])
    qtool.quantize("float", method="zeroquant", output="out", set=RANDOM)
    found = qtool.evaluate("out", "classification", data=tmp_path / "data")
    assert found.baseline is not None and found.baseline.value == 100.0 and not found.baseline.quantized
    assert found.candidate.quantized
    report = json.loads((tmp_path / "out" / "qtool.json").read_text())
    del report["source"]["sha256"]
    (tmp_path / "out" / "qtool.json").write_text(json.dumps(report))
    with pytest.raises(InputError, match="does not record its float model"):
        qtool.evaluate("out", "classification", data=tmp_path / "data")
