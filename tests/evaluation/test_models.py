import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qtool.errors import InputError
from qtool.evaluation.exams.classification import Classification
from qtool.evaluation.models import load_for, load_tokenizer, subject
from qtool.evaluation.tasks import task

SST2 = task("sst2")


@pytest.mark.parametrize(
    ("architecture", "probe"),
    [
        ("BertForSequenceClassification", False),
        ("BertModel", True),
        ("XLMRobertaModel", True),
        ("RobertaForMaskedLM", True),
    ],
)
def test_what_is_probed(architecture: str, probe: bool) -> None:
    assert (Classification.loader_for(architecture, SST2, "m") == "AutoModel") is probe


@pytest.mark.parametrize(
    ("architecture", "purpose"),
    [
        ("BertForQuestionAnswering", "finding answers"),
        ("RobertaForTokenClassification", "every token"),
        ("GPT2LMHeadModel", "generating text"),
        ("LlamaForCausalLM", "generating text"),
        ("GPT2DoubleHeadsModel", "something else"),
        ("BertForPreTraining", "pretraining"),
    ],
)
def test_heads_for_other_tasks(architecture: str, purpose: str) -> None:
    with pytest.raises(InputError) as error:
        Classification.loader_for(architecture, SST2, "some-model")
    assert all(word in str(error.value) for word in ("wrong task for the head", "some-model", architecture, purpose))


@pytest.mark.parametrize(
    ("architecture", "loaded"),
    [
        ("BertForSequenceClassification", transformers.BertForSequenceClassification),
        ("RobertaForSequenceClassification", transformers.RobertaForSequenceClassification),
        ("BertModel", transformers.BertModel),
        ("RobertaForMaskedLM", transformers.RobertaModel),
    ],
)
def test_classes_that_are_loaded(zoo: Any, capfd: Any, architecture: str, loaded: type[Any]) -> None:
    folder = zoo.make("m", architecture)
    capfd.readouterr()
    model = load_for(subject(folder, SST2))
    assert type(model) is loaded and not model.training and model.dtype == torch.float32
    assert load_for(subject(folder, SST2), "bfloat16").dtype == torch.bfloat16
    weights = load_file(folder / "model.safetensors")
    table = next(value for name, value in weights.items() if name.endswith("word_embeddings.weight"))
    assert torch.equal(model.get_input_embeddings().weight, table)
    assert capfd.readouterr() == ("", "")


def test_a_missing_head_is_named(zoo: Any) -> None:
    folder = zoo.make("m", "BertModel")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForSequenceClassification"]}))
    with pytest.raises(InputError, match=r"lacks weights of BertForSequenceClassification: classifier\.bias"):
        load_for(subject(folder, SST2))


def test_a_missing_encoder_tensor_is_named(zoo: Any) -> None:
    folder = zoo.make("m", "BertModel")
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"encoder\.layer\.1\.output\.dense\.weight"):
        load_for(subject(folder, SST2))


def test_a_wrong_shape_is_one_line(zoo: Any) -> None:
    folder = zoo.make("m")
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.weight"] = tensors["classifier.weight"][:, :-1].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError) as error:
        load_for(subject(folder, SST2))
    assert str(error.value).startswith(
        f"{folder}: tensor classifier.weight has shape [2, 31], and the config asks for [2, 32]"
    )
    assert "\n" not in str(error.value) and "ignore_mismatched_sizes" not in str(error.value)


def test_a_head_of_another_config_is_named(zoo: Any) -> None:
    folder = zoo.make("m", labels=("a", "b", "c"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"tensor classifier\.bias has shape \[3\], and the config asks for \[2\]"):
        load_for(subject(folder, SST2))


def test_a_masked_lm_head_is_not_read_and_may_be_wrong(zoo: Any) -> None:
    folder = zoo.make("m", "BertForMaskedLM")
    tensors = load_file(folder / "model.safetensors")
    tensors["cls.predictions.transform.dense.bias"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert type(load_for(subject(folder, SST2))) is transformers.BertModel
    tensors["bert.encoder.layer.0.output.dense.bias"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"encoder\.layer\.0\.output\.dense\.bias has shape \[3\]"):
        load_for(subject(folder, SST2))


def test_damage_is_found_before_loading(zoo: Any) -> None:
    folder = zoo.make("m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        subject(folder, SST2)
    with pytest.raises(InputError, match="no model at"):
        subject(folder / "nowhere", SST2)


def test_size_is_that_of_the_weight_files(zoo: Any) -> None:
    folder = zoo.make("m")
    found = subject(folder, SST2)
    assert found.size_bytes == (folder / "model.safetensors").stat().st_size
    assert (found.name, found.probed, found.quantized) == (str(folder), False, False)


def test_a_folder_without_tokenizer_is_refused(zoo: Any) -> None:
    with pytest.raises(InputError, match="no tokenizer files"):
        load_tokenizer(zoo.make("m", words=None))


def test_a_damaged_tokenizer_is_one_line(zoo: Any) -> None:
    folder: Path = zoo.make("m")
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(InputError, match="cannot be loaded") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_padding_pads_with_the_end_of_text(zoo: Any) -> None:
    folder: Path = zoo.make("m")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "[SEP]"}))
    before = (folder / "tokenizer_config.json").read_bytes()
    own = load_tokenizer(folder)
    assert (own.pad_token, own.pad_token_id) == ("[SEP]", 3)
    assert own(["w1 w2 w3", "w1"], padding=True).input_ids[1][-2:] == [3, 3]
    assert (folder / "tokenizer_config.json").read_bytes() == before


def test_no_remote_code_is_run(zoo: Any, tmp_path: Path) -> None:
    folder = zoo.make("m")
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of", "auto_map": names}))
    shutil.rmtree(tmp_path / "mark", ignore_errors=True)
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'mark')!r})")
    with pytest.raises(InputError):
        subject(folder, SST2)
    assert not (tmp_path / "mark").exists()
