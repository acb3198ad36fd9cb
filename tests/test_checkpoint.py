"""Float checkpoints as they come: old names, other prefixes, and every way of being broken."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qtool import checkpoint as module
from qtool.checkpoint import (
    WEIGHTS,
    WEIGHTS_INDEX,
    Checkpoint,
    check,
    load_config,
    locate,
    open_float,
    opened,
    sha256,
    skeleton,
    tensor_infos,
    weight_files,
)
from qtool.errors import InputError, UnavailableError

Tensors = dict[str, torch.Tensor]
CLASSES = [
    f"{family}{head}"
    for family in ("Bert", "Roberta", "XLMRoberta", "Camembert")
    for head in ("ForSequenceClassification", "ForMaskedLM", "Model")
]


def read(folder: Path) -> Checkpoint:
    return Checkpoint(folder, skeleton(load_config(folder)))


def change(folder: Path, edit: Callable[[Tensors], Tensors]) -> Path:
    """Write the tensors again, edited."""
    save_file(edit(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def rename(folder: Path, new_name: Callable[[str], str]) -> Path:
    return change(folder, lambda tensors: {new_name(name): value for name, value in tensors.items()})


def configure(folder: Path, **values: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return folder


def fails(match: str, folder: Path) -> str:
    """The whole of loading `folder` ends with an InputError of one line."""
    with pytest.raises(InputError, match=match) as error:
        found = read(locate(folder))
        for name in found._names:
            found.tensor(name)
    message = str(error.value)
    assert "\n" not in message and error.value.exit_code == 3
    return message


@pytest.fixture
def tiny(zoo: Any) -> Callable[..., Path]:
    """A model without a tokenizer, by architecture."""

    def make(architecture: str = "BertForSequenceClassification", **options: Any) -> Path:
        folder: Path = zoo.make(f"model-{architecture}", architecture, words=None, **options)
        return folder

    return make


@pytest.mark.parametrize("architecture", CLASSES)
def test_tensors_are_those_of_the_model(shelf: Any, architecture: str) -> None:
    folder = shelf.make(f"checkpoint-{architecture}", architecture, words=None)
    found, model = read(locate(folder)), getattr(transformers, architecture).from_pretrained(folder)
    for name, value in model.state_dict().items():
        assert torch.equal(found.tensor(name), value), name
    assert found.num_bytes == (folder / WEIGHTS).stat().st_size
    check(folder)


def test_a_skeleton_takes_no_memory(tiny: Any) -> None:
    model = skeleton(load_config(tiny()))
    assert type(model) is transformers.BertForSequenceClassification and not model.training
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "BertForMaskedLM", "BertModel"])
def test_old_names_of_layer_norm(tiny: Any, architecture: str) -> None:
    folder = tiny(architecture)
    wanted = load_file(folder / WEIGHTS)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    rename(folder, lambda name: next((name.replace(new, past) for new, past in old.items() if new in name), name))
    assert not any("LayerNorm.weight" in name for name in load_file(folder / WEIGHTS))
    found = read(folder)
    assert all(torch.equal(found.tensor(name), value) for name, value in wanted.items())


@pytest.mark.parametrize(("architecture", "prefix"), [("BertModel", "bert."), ("XLMRobertaModel", "roberta.")])
def test_a_prefix_that_the_base_model_does_not_have(tiny: Any, architecture: str, prefix: str) -> None:
    folder = tiny(architecture)
    wanted = load_file(folder / WEIGHTS)
    rename(folder, lambda name: prefix + name)
    found = read(folder)
    assert all(torch.equal(found.tensor(name), value) for name, value in wanted.items())


def test_a_prefix_that_the_file_does_not_have(tiny: Any) -> None:
    folder = tiny("RobertaForSequenceClassification")
    wanted = load_file(folder / WEIGHTS)
    rename(folder, lambda name: name.removeprefix("roberta."))
    found = read(folder)
    assert all(torch.equal(found.tensor(name), value) for name, value in wanted.items())


def test_tensors_of_no_use_are_left_alone(tiny: Any) -> None:
    folder = change(tiny(), lambda tensors: {**tensors, "bert.embeddings.position_ids": torch.arange(40)[None]})
    assert "bert.embeddings.position_ids" not in read(folder)._names


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "RobertaForMaskedLM"])
def test_a_tied_head_is_read_from_the_table(tiny: Any, architecture: str) -> None:
    folder = tiny(architecture)
    head = "cls.predictions.decoder" if architecture.startswith("Bert") else "lm_head.decoder"
    assert f"{head}.weight" not in load_file(folder / WEIGHTS)
    found = read(folder)
    table = next(name for name in found._names if name.endswith("word_embeddings.weight"))
    assert torch.equal(found.tensor(f"{head}.weight"), found.tensor(table))
    assert torch.equal(found.tensor(f"{head}.bias"), found.tensor(f"{head.removesuffix('.decoder')}.bias"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_become_float32(tiny: Any, dtype: torch.dtype) -> None:
    folder = change(tiny(), lambda tensors: {name: value.to(dtype) for name, value in tensors.items()})
    found, stored = read(folder), load_file(folder / WEIGHTS)
    for name, value in stored.items():
        assert found.tensor(name).dtype == torch.float32
        assert torch.equal(found.tensor(name), value.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_stored_is_not_in_memory(tiny: Any, dtype: torch.dtype) -> None:
    folder = change(tiny(), lambda tensors: {name: value.to(dtype) for name, value in tensors.items()})
    found, stored = read(folder), load_file(folder / WEIGHTS)
    name = "bert.encoder.layer.0.output.dense.weight"
    value = found.stored(name)
    assert value.dtype == dtype and torch.equal(value, stored[name])
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(folder / WEIGHTS))]
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
    assert any(first <= value.data_ptr() < last for first, last in ranges)


@pytest.mark.parametrize("part", [1, 7, 10**9])
def test_damage_and_ties_are_found_in_any_part(tiny: Any, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PART", part)
    folder = tiny("BertForMaskedLM")
    model, _ = open_float(folder)
    target, source = next(pair for pair in model.all_tied_weights_keys.items() if pair[0].endswith("weight"))

    def last(value: float) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        def changed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            other = tensors[source].clone()
            other[-1, -1] = value
            return {**tensors, target: other}

        return changed

    found = open_float(change(folder, last(9.0)))
    assert not found[0].config.tie_word_embeddings
    with pytest.raises(InputError, match="holds NaN or infinity"):
        open_float(change(folder, last(float("inf"))))[1].stored(target)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.float8_e4m3fn])
def test_codes_are_no_weights(tiny: Any, dtype: torch.dtype) -> None:
    folder = change(tiny(), lambda tensors: {**tensors, "classifier.bias": torch.tensor([3, 4]).to(dtype)})
    fails("tensor classifier.bias has dtype .*; qtool quantizes float checkpoints", folder)


def test_a_quantized_source_is_refused(tiny: Any) -> None:
    folder = tiny()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="is quantized already"):
        open_float(folder)


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "RobertaForMaskedLM"])
def test_a_head_with_its_own_values_is_untied(tiny: Any, architecture: str) -> None:
    """As in transformers: the config says tied, but the files hold two different matrices."""
    folder = tiny(architecture)
    model, _ = open_float(folder)
    tied = dict(model.all_tied_weights_keys)
    assert tied
    target, source = next(pair for pair in tied.items() if pair[0].endswith("weight"))
    same = change(folder, lambda tensors: {**tensors, target: tensors[source].clone()})
    assert open_float(same)[0].config.tie_word_embeddings
    other = change(folder, lambda tensors: {**tensors, target: tensors[source] + 1})
    untied, checkpoint = open_float(other)
    assert not untied.config.tie_word_embeddings
    assert torch.equal(checkpoint.tensor(target), checkpoint.tensor(source) + 1)


@pytest.mark.parametrize(
    "name", ["bert.encoder.layer.1.output.dense.weight", "classifier.bias", "bert.embeddings.word_embeddings.weight"]
)
def test_a_missing_tensor_is_named(tiny: Any, name: str) -> None:
    folder = change(tiny(), lambda tensors: {key: value for key, value in tensors.items() if key != name})
    message = fails(f"lacks weights of BertForSequenceClassification: {name};", folder)
    assert str(folder) in message


def test_many_missing_tensors_are_counted(tiny: Any) -> None:
    folder = change(tiny(), lambda tensors: {"bert.pooler.dense.bias": tensors["bert.pooler.dense.bias"]})
    total = len(skeleton(load_config(folder)).state_dict())
    fails(rf"lacks weights .* and {total - 1 - 3} more; fine-tune or save", folder)


def test_a_wrong_class_is_a_missing_head(tiny: Any) -> None:
    folder = configure(tiny("BertModel"), architectures=["BertForSequenceClassification"])
    fails(r"classifier\.weight, classifier\.bias; fine-tune", folder)


@pytest.mark.parametrize(
    ("edit", "shapes"),
    [
        (lambda value: value[:, :-1], r"\[48, 31\], but the config asks for \[48, 32\]"),
        (lambda value: value.t(), r"\[32, 48\], but the config asks for \[48, 32\]"),
        (lambda value: value.flatten(), r"\[1536\], but the config asks for \[48, 32\]"),
    ],
)
def test_a_wrong_shape_is_named(tiny: Any, edit: Callable[[Any], Any], shapes: str) -> None:
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    folder = change(tiny(), lambda tensors: {**tensors, name: edit(tensors[name]).contiguous()})
    fails(f"tensor {name} has shape {shapes}", folder)


@pytest.mark.parametrize("damage", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_damaged_values_are_named(tiny: Any, damage: float, dtype: torch.dtype) -> None:
    name = "bert.encoder.layer.1.attention.self.key.weight"

    def edit(tensors: Tensors) -> Tensors:
        tensors[name] = tensors[name].to(dtype)
        tensors[name][3, 5] = damage
        return tensors

    folder = change(tiny(), edit)
    fails(f"tensor {name} holds NaN or infinity", folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt"])
def test_pickled_weights_are_never_opened(tiny: Any, tmp_path: Path, name: str) -> None:
    folder = tiny()
    (folder / WEIGHTS).unlink()
    # Unpickling this would make a folder.
    (folder / name).write_bytes(b"cos\nmkdir\n(S'" + str(tmp_path / "mark").encode() + b"'\ntR.")
    message = fails("has only pickled weights.*save_pretrained", folder)
    assert str(folder) in message and not (tmp_path / "mark").exists()


def test_safetensors_beside_pickled_weights_are_read(tiny: Any) -> None:
    folder = tiny()
    (folder / "pytorch_model.bin").write_bytes(b"not opened")
    assert weight_files(locate(folder)) == [folder / WEIGHTS]


@pytest.mark.parametrize("left", [0, 4, 8, 100, -4, -1])
def test_a_truncated_file_is_named(tiny: Any, left: int) -> None:
    folder = tiny()
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:left])
    message = fails(r"model\.safetensors cannot be read \(truncated, corrupt or missing\)", folder)
    assert str(folder) in message
    with pytest.raises(InputError, match="truncated"):
        check(folder)


def test_other_damage_of_the_file(tiny: Any) -> None:
    folder = tiny()
    content = bytearray((folder / WEIGHTS).read_bytes())
    for position, byte in ((0, 255), (9, 0), (12, 0)):
        (folder / WEIGHTS).write_bytes(bytes([*content[:position], byte, *content[position + 1 :]]))
        fails(r"model\.safetensors cannot be read", folder)
    (folder / WEIGHTS).write_bytes(bytes(content) + b"more")
    fails(r"model\.safetensors cannot be read", folder)


def shard(folder: Path) -> Path:
    """The same tensors in two files under an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / WEIGHTS_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_files_under_an_index(tiny: Any) -> None:
    folder = tiny()
    wanted = load_file(folder / WEIGHTS)
    found = read(locate(shard(folder)))
    assert [file.name for file in found.files] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert all(torch.equal(found.tensor(name), value) for name, value in wanted.items())
    assert found.num_bytes == sum(file.stat().st_size for file in found.files)
    assert set(tensor_infos(found.files)) == set(wanted)


def test_a_file_of_the_index_that_is_gone(tiny: Any) -> None:
    folder = shard(tiny())
    (folder / "model-00002-of-00002.safetensors").unlink()
    fails(r"model-00002-of-00002\.safetensors cannot be read \(truncated, corrupt or missing\)", folder)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/elsewhere/model.safetensors", "a/b.safetensors", "..", ".", "", "x.bin", 1]
)
def test_an_index_may_not_leave_the_folder(tiny: Any, name: Any) -> None:
    folder = shard(tiny())
    (folder / WEIGHTS_INDEX).write_text(json.dumps({"weight_map": {"classifier.bias": name}}))
    fails("which is not a file of this folder", folder)


@pytest.mark.parametrize(
    "index",
    [
        *("", "{", "[]", "null", "{}", '{"weight_map": []}', '{"weight_map": null}', '{"weight_map": "x"}'),
        *('{"weight_map": {"a": ["x"]}}', '{"weight_map": {"a": "x.safetensors", "b": 2}}'),
    ],
)
def test_an_index_that_is_none(tiny: Any, index: str) -> None:
    folder = shard(tiny())
    (folder / WEIGHTS_INDEX).write_text(index)
    fails(r"model\.safetensors\.index\.json is not an index of safetensors files", folder)


def test_an_index_of_nothing(tiny: Any) -> None:
    folder = shard(tiny())
    (folder / WEIGHTS_INDEX).write_text('{"weight_map": {}}')
    fails("lacks weights of BertForSequenceClassification", folder)


def test_no_such_folder(tmp_path: Path) -> None:
    for name in (tmp_path / "nowhere", "./nowhere", "a/b/c", "~/no-such-folder-here", "no where"):
        with pytest.raises(InputError, match=r"no model at .*does not exist"):
            locate(name)


def test_folders_that_are_no_models(tiny: Any, tmp_path: Path) -> None:
    folder = tiny()
    with pytest.raises(InputError, match="is a file; pass the folder"):
        locate(folder / WEIGHTS)
    with pytest.raises(InputError, match=r"has no config\.json"):
        locate(tmp_path)
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        locate(folder)


def test_a_home_folder_is_expanded(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny()
    monkeypatch.setenv("HOME", str(folder.parent))
    assert locate(f"~/{folder.name}") == folder


@pytest.mark.parametrize("name", ["some-org/some-model", "bert-base-uncased"])
def test_a_hub_name_without_a_hub(name: str) -> None:
    with pytest.raises(UnavailableError, match="the hub is not reachable; pass a local folder") as error:
        locate(name)
    assert error.value.exit_code == 4 and name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["-dashed", "a--b", "x..y", "org/.model"])
def test_a_hub_name_that_cannot_be(name: str) -> None:
    with pytest.raises(InputError, match="no model") as error:
        locate(name)
    assert "\n" not in str(error.value)


def test_a_hub_name_is_fetched_without_code_or_pickles(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder: Path = tiny()
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate("some-org/some-model", "v2") == folder
    assert (asked["name"], asked["revision"]) == ("some-org/some-model", "v2")
    from fnmatch import fnmatch

    fetched = ("model.safetensors", "model-00001-of-00002.safetensors", "config.json", "tokenizer.json", WEIGHTS_INDEX)
    fetched += ("README.md",)  # says the license
    left = ("modeling.py", "pytorch_model.bin", "tf_model.h5", "onnx/model.onnx")
    for name in (*fetched, *left):
        assert any(fnmatch(name, pattern) for pattern in asked["allow_patterns"]) == (name in fetched), name


def evil(folder: Path, **config: Any) -> Path:
    """A config that asks for code beside it, which would leave a mark."""
    names = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}
    configure(folder, auto_map=names, **config)
    (folder / "evil.py").write_text(
        "from pathlib import Path\n"
        "from transformers import BertConfig, BertForSequenceClassification\n"
        "Path(__file__).with_name('mark').mkdir()\n"
        f"Path({str(folder / 'mark')!r}).mkdir(exist_ok=True)\n"
        "class Config(BertConfig):\n    model_type = 'evil'\n"
        "class Model(BertForSequenceClassification):\n    config_class = Config\n"
    )
    return folder


def test_remote_code_is_refused(tiny: Any) -> None:
    folder = evil(tiny(), model_type="evil")
    fails("needs code of its own to run; qtool never runs remote code", folder)
    assert not (folder / "mark").exists()


def test_remote_code_is_not_run_for_a_known_type_either(tiny: Any) -> None:
    folder = evil(tiny())
    assert type(skeleton(load_config(folder))) is transformers.BertForSequenceClassification
    assert not (folder / "mark").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"bert"', "\udcff"])
def test_a_config_that_is_none(tiny: Any, text: str) -> None:
    folder = tiny()
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    fails(r"config\.json cannot be used", folder)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"model_type": "unheard-of"}, r"config\.json cannot be used.*unheard-of"),
        ({"model_type": None}, r"config\.json cannot be used"),
        ({"architectures": None}, "names no class in `architectures`"),
        ({"architectures": []}, "names no class in `architectures`"),
        ({"architectures": ["BertForNothing"]}, "transformers has no class BertForNothing"),
        ({"hidden_size": "wide"}, r"config\.json cannot be used"),
        ({"hidden_size": 33}, r"config\.json cannot be used.*33"),
    ],
)
def test_configs_that_do_not_fit(tiny: Any, values: dict[str, Any], match: str) -> None:
    folder = configure(tiny(), **values)
    assert str(folder) in fails(match, folder) or "BertForNothing" in match


def test_the_digest_covers_config_and_weights(tiny: Any) -> None:
    folder = tiny()
    first = read(folder).digest()
    assert read(folder).digest() == first
    both = "".join(hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("config.json", WEIGHTS))
    assert first == hashlib.sha256(both.encode()).hexdigest()
    change(folder, lambda tensors: {**tensors, "classifier.bias": tensors["classifier.bias"] + 1})
    second = read(folder).digest()
    configure(folder, hidden_dropout_prob=0.2)
    assert len({first, second, read(folder).digest()}) == 3


@pytest.mark.parametrize("size", [0, 1, (1 << 20) + 1])
def test_sha256_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    (tmp_path / "f").write_bytes(b"x" * size)
    wanted = hashlib.sha256(b"x" * size).hexdigest()
    assert sha256(tmp_path / "f") == wanted
    monkeypatch.delattr(hashlib, "file_digest", raising=False)  # Python 3.10 has none
    assert sha256(tmp_path / "f") == wanted


def test_errors_inside_an_opened_file_are_left_alone(tiny: Any) -> None:
    folder = tiny()
    with pytest.raises(ZeroDivisionError), opened(folder / WEIGHTS):
        raise ZeroDivisionError
    with pytest.raises(InputError, match="mine"), opened(folder / WEIGHTS):
        raise InputError("mine")
