"""Artifacts in plain transformers: loaded, saved and loaded again, refused when they are damaged or not understood."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_models import golden_check_here
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import qtool
from qtool.artifact import check_manifest, damaged_tensors, quantization_config
from qtool.checkpoint import WEIGHTS, WEIGHTS_INDEX, weight_files
from qtool.errors import InputError, UnavailableError
from qtool.inspection import inspect
from qtool.kernels import triton
from qtool.nn import QEmbedding, QLinear, QModule, QTiedLinear
from qtool.numerics import QuantSpec

HEADS = {
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForMaskedLM": AutoModelForMaskedLM,
    "Model": AutoModel,
}
CLASSES = [f"{family}{head}" for family in ("Bert", "Roberta", "XLMRoberta", "Camembert") for head in HEADS]
BERT, ROBERTA = "BertForSequenceClassification", "RobertaForSequenceClassification"
Quantized = Callable[..., Path]


def auto_class(architecture: str) -> Any:
    return next(loader for suffix, loader in HEADS.items() if architecture.endswith(suffix))


@pytest.fixture(scope="session")
def quantized(shelf: Any) -> Iterator[Quantized]:
    """The artifact of a tiny model, by architecture and recipe entries; made once. Its source is beside it."""
    made: dict[Any, Path] = {}

    def make(architecture: str = BERT, *sets: str) -> Path:
        key = (architecture, *sets)
        if key not in made:
            name = f"hf-{len(made)}"
            options = {"labels": ("bad", "good")} if architecture.endswith("Classification") else {}
            source = shelf.make(name, architecture, type_vocab_size=3, **options)
            with golden_check_here(shelf.folder):
                entries = ("calibration.source=random", "calibration.num_samples=8", *sets)
                made[key] = qtool.quantize(
                    str(source), method="zeroquant", output=shelf.folder / f"{name}-int8", set=entries
                ).path
        return made[key]

    yield make


@pytest.fixture
def copied(quantized: Quantized, tmp_path: Path) -> Quantized:
    """A copy of an artifact that a test may damage."""

    def make(*key: str) -> Path:
        return Path(shutil.copytree(quantized(*key), tmp_path / "copy"))

    return make


def source_of(artifact: Path) -> Path:
    return artifact.with_name(artifact.name.removesuffix("-int8"))


def batch(count: int = 4, tokens: int = 11) -> dict[str, torch.Tensor]:
    """Sequences of 1 to `tokens` tokens, padded."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 65, (count, tokens), generator=draw)
    mask = (torch.arange(tokens) < torch.randint(1, tokens + 1, (count, 1), generator=draw)).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@torch.no_grad()
def outputs(model: Any, dtype: torch.dtype = torch.float32, inputs: Any = None) -> dict[str, torch.Tensor]:
    found = {name: value for name, value in model(**(inputs or batch())).items() if isinstance(value, torch.Tensor)}
    assert found and all(value.dtype == dtype and value.isfinite().all() for value in found.values())
    return found


def real(output: torch.Tensor) -> torch.Tensor:
    """Of the outputs for `batch()` those at real tokens: what stands at padding is nobody's business."""
    mask = batch()["attention_mask"].bool()
    return output[mask] if output.shape[:2] == mask.shape else output


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    """Equal names, types and bits."""
    return list(found) == list(wanted) and all(
        found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]) for name in wanted
    )


def untiled(codes: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """Codes by their place in the file: [rows / 16, columns / 4, 16, 4]."""
    row, column = torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")
    return codes[row // 16, column // 4, row % 16, column % 4]


def spread(scale: torch.Tensor, shape: list[int]) -> torch.Tensor:
    rows, columns = (size // blocks for size, blocks in zip(shape, scale.shape, strict=True))
    return scale.double().repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def simulated(artifact: Path) -> Any:
    """The stock model in float64 on the dequantized tensors of the file, its inputs of quantized layers rounded."""
    tensors, modules = load_file(artifact / WEIGHTS), quantization_config(artifact)["modules"]
    config = transformers.AutoConfig.from_pretrained(artifact)
    del config.quantization_config
    model = getattr(transformers, config.architectures[0])(config).double().eval()
    for path, module in modules.items():
        if module["type"] == "tied_linear":
            continue
        scale, codes = tensors.pop(f"{path}.weight_scale"), tensors[f"{path}.weight"]
        codes = untiled(codes, module["shape"]) if module["type"] == "linear" else codes.squeeze(1)
        tensors[f"{path}.weight"] = codes.double() * spread(scale, module["shape"])
        if module["type"] == "linear":
            step = tensors.pop(f"{path}.act_scale", None)
            model.get_submodule(path).register_forward_pre_hook(
                lambda layer, args, step=step: (rounded(args[0], step),)
            )
    for path, module in modules.items():
        if module["type"] == "tied_linear":
            tensors[f"{path}.weight"] = tensors[f"{module['table']}.weight"]
    model.load_state_dict({name: value.double() for name, value in tensors.items()})
    return model


def rounded(x: torch.Tensor, step: torch.Tensor | None) -> torch.Tensor:
    step = x.abs().amax(-1, keepdim=True) / 127 if step is None else step.double()
    return torch.floor(x / step + 0.5).clamp(-127, 127) * step


def agrees_with_the_file(folder: Path, architecture: str) -> None:
    """An artifact's outputs against the simulation. Here and there an input lies so near between two codes that float32
    and float64 choose differently, so medians are compared: with each other, and with what quantization changes."""
    inputs = batch(64, 6)
    model = auto_class(architecture).from_pretrained(folder)
    assert type(model).__name__ == architecture and not model.training and model.dtype == torch.float32
    found, wanted = outputs(model, inputs=inputs), outputs(simulated(folder), torch.float64, inputs)
    floats = outputs(auto_class(architecture).from_pretrained(source_of(folder)), inputs=inputs)
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        real = inputs["attention_mask"].bool() if value.shape[:2] == (64, 6) else slice(None)
        error, lost = ((side[name].double() - value)[real].abs().median() for side in (found, floats))
        assert error < 0.02 * lost < 0.01 * value[real].abs().median(), (name, error, lost)


@pytest.mark.parametrize("architecture", CLASSES)
def test_outputs_are_those_of_the_tensors_in_the_file(quantized: Quantized, architecture: str) -> None:
    agrees_with_the_file(quantized(architecture), architecture)


@pytest.mark.parametrize(
    "sets",
    [
        ("activations=int8:tensor:sym",),
        ("weights=int8:group:16:sym",),
        ("weights=int8:rows:8:sym", "rules.*query=float"),
        ("weights=int6:block:16x16:sym", "methods.zeroquant.small_embeddings=float"),
        ("methods.zeroquant.word_embeddings=int16:rows:5:sym",),
    ],
)
def test_other_recipes(quantized: Quantized, sets: tuple[str, ...]) -> None:
    agrees_with_the_file(quantized(BERT, *sets), BERT)


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "RobertaForMaskedLM"])
@pytest.mark.parametrize("small", ["int16:channel:sym", "float"])
def test_a_float_table_stays_tied_to_its_head(
    quantized: Quantized, tmp_path: Path, architecture: str, small: str
) -> None:
    sets = ("methods.zeroquant.word_embeddings=float", f"methods.zeroquant.small_embeddings={small}")
    folder = quantized(architecture, *sets)
    model = AutoModelForMaskedLM.from_pretrained(folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not any("decoder.weight" in name for name in load_file(folder / WEIGHTS))
    floats = real(outputs(AutoModelForMaskedLM.from_pretrained(source_of(folder)))["logits"])
    assert (real(outputs(model)["logits"]) - floats).norm() < 0.2 * floats.norm()
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "saved")
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert same(again.state_dict(), model.state_dict()) and same(outputs(again), outputs(model))
    assert damaged_tensors(tmp_path / "saved") == []


# Loading in other processes


CHILDREN = """
import json, os, sys, traceback

def child(body):
    '''Run `body` in a process of its own; its exit status.'''
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        try:
            body()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
"""

ORDERS = (
    CHILDREN
    + """
classifier, masked, inputs, scratch = sys.argv[1:]

def light():
    import qtool, qtool.errors
    assert not {"torch", "transformers", "numpy"} & set(sys.modules), sorted(sys.modules)

def qtool_first():
    import qtool
    import transformers
    use("first")

def qtool_between():
    import transformers
    assert "transformers.quantizers.auto" not in sys.modules
    import qtool
    use("between")

def qtool_last():
    from transformers import BertForSequenceClassification
    assert "transformers.quantizers.auto" in sys.modules
    import qtool
    import importlib
    importlib.reload(qtool)
    use("last")

def use(name):
    import transformers
    from safetensors.torch import load_file, save_file
    torch.set_num_threads(2)
    batch = load_file(inputs)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier)
    body = transformers.AutoModel.from_pretrained(classifier)
    language = transformers.AutoModelForMaskedLM.from_pretrained(masked)
    with torch.no_grad():
        found = {"logits": model(**batch).logits, "hidden": body(**batch).last_hidden_state}
        found["masked"] = language(**batch).logits
    save_file(found, f"{scratch}/{name}.safetensors")
    said = transformers.pipeline("text-classification", classifier)(["w1 w2 w3", "w7"])
    guess = transformers.pipeline("fill-mask", masked)("w1 [MASK] w3")
    with open(f"{scratch}/{name}.json", "w") as file:
        json.dump([said, guess], file)

status = [child(light)]
import torch
print(json.dumps(status + [child(body) for body in (qtool_first, qtool_between, qtool_last)]))
"""
)


def run_script(code: str, *arguments: Any, **environment: str) -> Any:
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "error", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


def test_qtool_may_be_imported_before_and_after_transformers(quantized: Quantized, tmp_path: Path) -> None:
    classifier, masked = quantized(BERT), quantized("BertForMaskedLM")
    save_file(batch(), tmp_path / "inputs.safetensors")
    statuses, stderr = run_script(ORDERS, classifier, masked, tmp_path / "inputs.safetensors", tmp_path)
    assert statuses == [0, 0, 0, 0], stderr
    wanted = {
        "logits": outputs(AutoModelForSequenceClassification.from_pretrained(classifier))["logits"],
        "hidden": outputs(AutoModel.from_pretrained(classifier))["last_hidden_state"],
        "masked": outputs(AutoModelForMaskedLM.from_pretrained(masked))["logits"],
    }
    said = [
        transformers.pipeline("text-classification", str(classifier))(["w1 w2 w3", "w7"]),
        transformers.pipeline("fill-mask", str(masked))("w1 [MASK] w3"),
    ]
    for order in ("first", "between", "last"):
        found = load_file(tmp_path / f"{order}.safetensors")
        assert same(dict(sorted(found.items())), dict(sorted(wanted.items()))), order
        assert json.loads((tmp_path / f"{order}.json").read_text()) == said


WITHOUT = (
    CHILDREN
    + """
import transformers
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, pipeline
from transformers import BertModel, BertTokenizer, RobertaModel, RobertaTokenizer  # once, not in every child

float_model, *artifacts = sys.argv[1:]
loaders = {
    "AutoModel": AutoModel.from_pretrained,
    "AutoModelForSequenceClassification": AutoModelForSequenceClassification.from_pretrained,
    "AutoModelForMaskedLM": AutoModelForMaskedLM.from_pretrained,
    "text-classification": lambda folder: pipeline("text-classification", folder),
    "fill-mask": lambda folder: pipeline("fill-mask", folder),
}
found = {name: {folder: child(lambda: load(folder)) for folder in artifacts} for name, load in loaders.items()}
for folder in artifacts:
    name = json.load(open(f"{folder}/config.json"))["architectures"][0]
    found.setdefault("own", {})[folder] = child(lambda: getattr(transformers, name).from_pretrained(folder))
assert "qtool" not in sys.modules
print(json.dumps([child(lambda: AutoModel.from_pretrained(float_model)), found]))
"""
)


def test_without_qtool_every_load_is_an_error(quantized: Quantized) -> None:
    folders = [quantized(kind) for kind in (BERT, "RobertaForMaskedLM", "BertForMaskedLM", "BertModel")]
    folders.append(
        quantized(BERT, "methods.zeroquant.word_embeddings=float", "methods.zeroquant.small_embeddings=float")
    )
    (control, found), stderr = run_script(WITHOUT, source_of(folders[0]), *folders)
    assert control == 0, stderr
    assert len(found) == 6 and all(len(statuses) == len(folders) for statuses in found.values())
    assert [(name, folder) for name, statuses in found.items() for folder in statuses if statuses[folder] == 0] == []


CAUSAL_WITHOUT = (
    CHILDREN
    + """
import transformers
from transformers import AutoModel, AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM, pipeline

loaders = [AutoModel.from_pretrained, AutoModelForCausalLM.from_pretrained, lambda x: pipeline("text-generation", x)]
own = [GPT2LMHeadModel.from_pretrained, LlamaForCausalLM.from_pretrained]
found = [
    [child(lambda: load(folder)) for load in (*loaders, mine)]
    for mine, folders in zip(own, (sys.argv[1:3], sys.argv[3:5])) for folder in folders
]
assert "qtool" not in sys.modules
print(json.dumps(found))
"""
)


def test_without_qtool_every_load_of_a_decoder_is_an_error(quantized: Quantized) -> None:
    folders = [quantized(kind) for kind in ("GPT2LMHeadModel", "LlamaForCausalLM")]
    found, stderr = run_script(CAUSAL_WITHOUT, *(path for folder in folders for path in (source_of(folder), folder)))
    floats, codes = found[0::2], found[1::2]
    assert floats == [[0] * 4] * 2, stderr
    assert codes == [[1] * 4] * 2, stderr


@pytest.mark.parametrize("architecture", CLASSES)
def test_quantized_weights_have_another_shape_than_float_ones(quantized: Quantized, architecture: str) -> None:
    folder = quantized(architecture)
    stored = load_file(folder / WEIGHTS)
    stock = auto_class(architecture).from_pretrained(source_of(folder)).state_dict()
    parts = [path for path, module in quantization_config(folder)["modules"].items() if module["type"] != "tied_linear"]
    assert len(parts) == 3 + 2 * 6
    for path in parts:
        assert stored[f"{path}.weight"].shape != stock[f"{path}.weight"].shape
        assert not stored[f"{path}.weight"].is_floating_point()


# Saving and loading again


MOVES: list[tuple[str, Any]] = [
    *((architecture, auto_class(architecture)) for architecture in CLASSES),
    (BERT, AutoModel),
    (ROBERTA, AutoModel),
    ("BertForMaskedLM", AutoModel),
    ("RobertaForMaskedLM", AutoModel),
    ("BertModel", AutoModelForSequenceClassification),
    ("RobertaModel", AutoModelForSequenceClassification),
    ("BertForMaskedLM", AutoModelForSequenceClassification),
    ("BertModel", AutoModelForTokenClassification),
    ("BertForMaskedLM", AutoModelForTokenClassification),
]


@pytest.mark.parametrize(("architecture", "loader"), MOVES)
def test_save_and_load_again_is_bit_exact(quantized: Quantized, tmp_path: Path, architecture: str, loader: Any) -> None:
    folder = quantized(architecture)
    first = loader.from_pretrained(folder)
    first.save_pretrained(tmp_path / "saved")
    second = loader.from_pretrained(tmp_path / "saved")
    assert type(second) is type(first)
    assert same(second.state_dict(), first.state_dict())
    assert same(outputs(second), outputs(first))
    described = {path: module.description() for path, module in first.named_modules() if isinstance(module, QModule)}
    config = quantization_config(tmp_path / "saved")
    assert config["modules"] == described and len(described) >= 3 + 2 * 6
    assert damaged_tensors(tmp_path / "saved") == []
    kept = {key: value for key, value in quantization_config(folder).items() if key not in ("modules", "tensors")}
    assert {key: value for key, value in config.items() if key not in ("modules", "tensors")} == kept


@pytest.mark.parametrize(("architecture", "loader"), MOVES)
def test_quantized_parts_are_those_of_the_file_in_any_class(
    quantized: Quantized, architecture: str, loader: Any
) -> None:
    folder = quantized(architecture)
    stored, model = load_file(folder / WEIGHTS), loader.from_pretrained(folder)
    prefix = f"{model.base_model_prefix}."
    bare = {name.removeprefix(prefix): value for name, value in stored.items()}
    count = 0
    for path, module in model.named_modules():
        if isinstance(module, QLinear | QEmbedding):
            for name, value in module.state_dict().items():
                assert torch.equal(value, bare[f"{path}.{name}".removeprefix(prefix)])
                count += 1
    assert count == 3 * 2 + 2 * 6 * 3


def test_a_second_save_writes_the_same_bytes(quantized: Quantized, tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(quantized(BERT)).save_pretrained(tmp_path / "one")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    for name in ("config.json", WEIGHTS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("architecture", [BERT, "RobertaForMaskedLM"])
def test_shards(quantized: Quantized, tmp_path: Path, architecture: str) -> None:
    loader = auto_class(architecture)
    first = loader.from_pretrained(quantized(architecture))
    first.save_pretrained(tmp_path / "saved", max_shard_size="8KB")
    assert (tmp_path / "saved" / WEIGHTS_INDEX).is_file()
    assert len(weight_files(tmp_path / "saved")) > 2 and damaged_tensors(tmp_path / "saved") == []
    second = loader.from_pretrained(tmp_path / "saved")
    assert same(second.state_dict(), first.state_dict()) and same(outputs(second), outputs(first))
    gone = weight_files(tmp_path / "saved")[1]
    gone.unlink()
    with pytest.raises((InputError, OSError), match=gone.name):
        loader.from_pretrained(tmp_path / "saved")


def test_a_changed_head_is_saved_as_it_is(quantized: Quantized, tmp_path: Path) -> None:
    first = AutoModelForSequenceClassification.from_pretrained(quantized(BERT))
    with torch.no_grad():
        first.classifier.weight.mul_(2)
    first.bert.encoder.layer[0].output.dense.weight.neg_()
    first.save_pretrained(tmp_path / "saved")
    second = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert same(outputs(second), outputs(first)) and damaged_tensors(tmp_path / "saved") == []


@pytest.mark.parametrize("architecture", [BERT, "RobertaForMaskedLM"])
def test_the_base_model_inside_is_saved_as_a_base_model(
    quantized: Quantized, tmp_path: Path, architecture: str
) -> None:
    whole = auto_class(architecture).from_pretrained(quantized(architecture))
    whole.base_model.save_pretrained(tmp_path / "base")
    base = AutoModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        wanted = whole.base_model(**batch()).last_hidden_state
    assert torch.equal(outputs(base)["last_hidden_state"], wanted)
    whole.save_pretrained(tmp_path / "whole")
    assert same(outputs(auto_class(architecture).from_pretrained(tmp_path / "whole")), outputs(whole))


def test_settings_of_the_model_are_kept(quantized: Quantized, tmp_path: Path) -> None:
    folder = quantized(BERT)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "bad", 1: "good"}
    before, after = (json.loads((place / "config.json").read_text()) for place in (source_of(folder), folder))
    assert after.pop("quantization_config")["quant_method"] == "qtool"
    del before["transformers_version"]
    assert after == before


@pytest.mark.parametrize("architecture", ["BertModel", ROBERTA])
def test_a_tied_head_on_a_table_that_was_quantized_without_it(
    quantized: Quantized, tmp_path: Path, architecture: str
) -> None:
    AutoModel.from_pretrained(quantized(architecture)).save_pretrained(tmp_path / "saved")
    for folder in (quantized(architecture), tmp_path / "saved"):
        with pytest.raises(InputError, match=r"ForMaskedLM shares .*decoder\.weight with an embedding table"):
            AutoModelForMaskedLM.from_pretrained(folder)


def test_odd_settings_of_the_source(shelf: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Outputs as tuples, and code of its own that nothing here needs: neither spoils the artifact."""
    source = shelf.make("hf-odd", type_vocab_size=3)
    edit_config(source, lambda config: config.update(return_dict=False, auto_map={"AutoModel": "custom.Model"}))
    monkeypatch.chdir(tmp_path)
    entries = ("calibration.source=random", "calibration.num_samples=4")
    found = qtool.quantize(str(source), method="zeroquant", output=tmp_path / "out", set=entries)  # in a new process
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in config and config["return_dict"] is False
    assert (found.path / WEIGHTS).stat().st_size == found.size_bytes < found.source_bytes
    assert isinstance(AutoModelForSequenceClassification.from_pretrained(found.path)(**batch()), tuple)


# Damage


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def deleted(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def renamed(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[f"{name}s"] = tensors.pop(name)


def reshaped(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name][None]


def cut(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name][:-1].contiguous()


def retyped(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].to(torch.int16 if tensors[name].dtype == torch.int8 else torch.float16)


@pytest.mark.parametrize(
    "name",
    [
        "bert.encoder.layer.1.attention.self.key.weight",
        "bert.encoder.layer.0.output.dense.weight_scale",
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.position_embeddings.weight_scale",
        "bert.embeddings.LayerNorm.bias",
        "classifier.weight",
    ],
)
@pytest.mark.parametrize("damage", [deleted, renamed, reshaped, cut, retyped])
def test_a_damaged_tensor_is_named(copied: Quantized, name: str, damage: Callable[..., None]) -> None:
    folder = edit_tensors(copied(BERT), lambda tensors: damage(tensors, name))
    for loader in (AutoModelForSequenceClassification, AutoModel):
        with pytest.raises(InputError) as error:
            loader.from_pretrained(folder)
        message = str(error.value)
        assert f": {name}" in message and str(folder) in message and "\n" not in message
        assert (f"missing: {name}" in message) == (damage in (deleted, renamed))
        assert (f"unexpected: {name}s" in message) == (damage is renamed)
        assert (f"another shape or dtype: {name}" in message) == (damage in (reshaped, cut, retyped))


def test_all_scales_deleted(copied: Quantized) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_scale")]:
            del tensors[name]

    with pytest.raises(InputError, match=r"missing: .*weight_scale, .*weight_scale, .*weight_scale …"):
        AutoModelForSequenceClassification.from_pretrained(edit_tensors(copied(BERT), edit))


def test_a_tensor_too_many_is_named(copied: Quantized) -> None:
    folder = edit_tensors(copied(BERT), lambda tensors: tensors.update(extra=torch.zeros(1)))
    with pytest.raises(InputError, match="unexpected: extra"):
        AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize("left", [0, 7, 100, 0.5, -1])
def test_a_truncated_file_is_an_error(copied: Quantized, left: float) -> None:
    folder = copied(BERT)
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: int(left * len(content)) if isinstance(left, float) else left])
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read \(truncated"):
        AutoModelForSequenceClassification.from_pretrained(folder)
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read \(truncated"):
        transformers.pipeline("text-classification", str(folder))


def test_a_module_that_the_model_does_not_have(copied: Quantized) -> None:
    folder = edit_config(copied(BERT), lambda config: config.update(num_hidden_layers=1))
    with pytest.raises(InputError, match=r"BertForSequenceClassification has no module bert\.encoder\.layer\.1"):
        AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize("version", [2, 99, 0, -1, True, 1.0, "2", None, [1]])
def test_another_format_version_is_refused(copied: Quantized, version: Any) -> None:
    folder = edit_config(copied(BERT), lambda config: config["quantization_config"].update(version=version))
    for loader in (AutoModelForSequenceClassification, AutoModel):
        with pytest.raises(InputError, match=r"format version .*upgrade qtool") as error:
            loader.from_pretrained(folder)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["version", "modules", "tensors"])
def test_a_config_without_what_is_needed(copied: Quantized, key: str) -> None:
    folder = edit_config(copied(BERT), lambda config: config["quantization_config"].pop(key))
    with pytest.raises(InputError, match=f"quantization_config .*{key}.*; upgrade|quantization_config lacks .*{key}"):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_an_unknown_module_type_is_refused(copied: Quantized) -> None:
    path = "bert.encoder.layer.0.output.dense"
    folder = edit_config(
        copied(BERT), lambda config: config["quantization_config"]["modules"][path].update(type="linea")
    )
    with pytest.raises(InputError, match=f"{path}: unknown module type 'linea'; did you mean linear"):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_activations_that_the_layer_does_not_compute_are_refused(copied: Quantized) -> None:
    path = "bert.encoder.layer.0.output.dense"
    folder = edit_config(
        copied(BERT),
        lambda config: config["quantization_config"]["modules"][path].update(activations="int4:token:sym"),
    )
    with pytest.raises(InputError, match=f"{path}: activations int4:token:sym cannot run"):
        AutoModelForSequenceClassification.from_pretrained(folder)


DENSE, TABLE = "bert.encoder.layer.0.output.dense", "bert.embeddings.word_embeddings"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("modules", []),
        ("modules", "x"),
        ("tensors", []),
        (f"modules/{DENSE}", []),
        (f"modules/{DENSE}", {}),
        (f"modules/{DENSE}/type", 3),
        (f"modules/{DENSE}/shape", [32]),
        (f"modules/{DENSE}/shape", [32, "48"]),
        (f"modules/{DENSE}/shape", [32, 10**30]),
        (f"modules/{DENSE}/shape", [32, 0]),
        (f"modules/{DENSE}/weights", ["int8"]),
        (f"modules/{DENSE}/activations", None),
        (f"modules/{DENSE}/bias", "yes"),
        (f"modules/{TABLE}/padding_idx", "0"),
        ("modules/", {"type": "linear", "shape": [1, 1], "weights": "int8", "activations": "int8", "bias": True}),
        (f"tensors/{DENSE}.bias", None),
        (f"tensors/{DENSE}.bias", ["F32", [32]]),
        (f"tensors/{DENSE}.bias", ["F32", 32, "0123"]),
        (f"tensors/{DENSE}.bias", ["F32", ["32"], "0123"]),
    ],
)
def test_a_damaged_description_is_one_line(copied: Quantized, key: str, value: Any) -> None:
    def edit(config: dict[str, Any]) -> None:
        *steps, last = key.split("/")
        inner = config["quantization_config"]
        for step in steps:
            inner = inner[step]
        inner[last] = value

    folder = edit_config(copied(BERT), edit)
    loaders = (AutoModelForSequenceClassification.from_pretrained, AutoModel.from_pretrained, inspect)
    for loader in loaders:
        with pytest.raises(InputError, match=r"quantization_config .*config\.json is damaged") as error:
            loader(folder)
        assert "\n" not in str(error.value)


def test_a_tied_head_without_its_table(copied: Quantized) -> None:
    def edit(config: dict[str, Any]) -> None:
        tied = [item for item in config["quantization_config"]["modules"].values() if item["type"] == "tied_linear"]
        tied[0]["table"] = "bert.nowhere"

    with pytest.raises(InputError, match=r"BertForMaskedLM has no table bert\.nowhere"):
        AutoModelForMaskedLM.from_pretrained(edit_config(copied("BertForMaskedLM"), edit))


def test_unknown_keys_of_a_later_writer_survive(copied: Quantized, tmp_path: Path) -> None:
    folder = edit_config(copied(BERT), lambda config: config["quantization_config"].update(note={"a": [1]}))
    AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert quantization_config(tmp_path / "saved")["note"] == {"a": [1]}


# Types and devices


def codes_and_scales(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: value.clone()
        for name, value in model.state_dict().items()
        if not value.is_floating_point() or name.endswith("_scale")
    }


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("architecture", [BERT, ROBERTA, "BertForMaskedLM", "RobertaForMaskedLM", "BertModel"])
@pytest.mark.parametrize("dtype", HALF)
def test_loading_in_half_precision(quantized: Quantized, tmp_path: Path, architecture: str, dtype: torch.dtype) -> None:
    folder, loader = quantized(architecture), auto_class(architecture)
    full, model = loader.from_pretrained(folder), loader.from_pretrained(folder, dtype=dtype)
    assert model.dtype == dtype
    assert same(codes_and_scales(model), codes_and_scales(full)) and codes_and_scales(model)
    found = outputs(model, dtype)
    for name, value in outputs(full).items():
        assert (real(found[name]).float() - real(value)).norm() < 0.2 * real(value).norm()
    model.to("cpu")
    assert same(outputs(model, dtype), found)
    model.save_pretrained(tmp_path / "saved")
    again = loader.from_pretrained(tmp_path / "saved")
    assert again.dtype == dtype and same(again.state_dict(), model.state_dict()) and same(outputs(again, dtype), found)


@pytest.mark.parametrize("architecture", [BERT, "BertForMaskedLM", "RobertaForMaskedLM"])
@pytest.mark.parametrize("dtype", HALF)
def test_a_cast_of_a_loaded_model(quantized: Quantized, tmp_path: Path, architecture: str, dtype: torch.dtype) -> None:
    folder, loader = quantized(architecture), auto_class(architecture)
    model, loaded = loader.from_pretrained(folder), loader.from_pretrained(folder, dtype=dtype)
    before = codes_and_scales(model)
    model.to(dtype)
    assert same(codes_and_scales(model), before)
    assert same(model.state_dict(), loaded.state_dict()) and same(outputs(model, dtype), outputs(loaded, dtype))
    model.save_pretrained(tmp_path / "saved")
    assert same(outputs(loader.from_pretrained(tmp_path / "saved"), dtype), outputs(loaded, dtype))


def test_static_scales_survive_half_precision(quantized: Quantized) -> None:
    folder = quantized(BERT, "activations=int8:tensor:sym")
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16).to(torch.float16)
    stored = load_file(folder / WEIGHTS)
    for name in [name for name in stored if name.endswith("_scale")]:
        assert model.state_dict()[name].dtype == torch.float32 and torch.equal(model.state_dict()[name], stored[name])
    assert sum(name.endswith("act_scale") for name in stored) == 12


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without a GPU, whatever this one has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton.reason.cache_clear()
    yield
    triton.reason.cache_clear()


@pytest.mark.parametrize(
    ("device_map", "said"),
    [
        *((one, r"asks for cuda:\d: torch .*or leave device_map out") for one in ("cuda", "cuda:1", 0, {"": "cuda:0"})),
        ("mps", "asks for mps; qtool models run on the CPU or on an NVIDIA GPU"),
        ({"": "disk"}, "asks for disk; qtool models run on the CPU"),
        ({"bert": "cpu", "classifier": "disk"}, "spreads a model over cpu, disk; one of qtool runs on one device"),
        ({"bert": 0, "classifier": "cpu"}, "spreads a model over cuda:0, cpu;"),
    ],
)
def test_other_devices_are_refused(quantized: Quantized, device_map: Any, said: str, without_gpu: None) -> None:
    with pytest.raises(UnavailableError, match=f"device_map {said}") as error:
        AutoModelForSequenceClassification.from_pretrained(quantized(BERT), device_map=device_map)
    assert error.value.exit_code == 4 and "\n" not in str(error.value)


@pytest.mark.parametrize("device_map", [None, "auto", "cpu", {"": "cpu"}, "balanced", "sequential"])
def test_the_cpu_is_a_device(quantized: Quantized, device_map: Any, without_gpu: None) -> None:
    wanted = outputs(AutoModelForSequenceClassification.from_pretrained(quantized(BERT)))
    model = AutoModelForSequenceClassification.from_pretrained(quantized(BERT), device_map=device_map)
    assert model.device.type == "cpu" and same(outputs(model), wanted)


def test_training_is_refused_and_nothing_is_trainable_but_float_parameters(quantized: Quantized) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(quantized(BERT))
    assert not model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_serializable()
    assert not any(value.requires_grad for value in model.buffers())


def test_copies_give_the_same(quantized: Quantized) -> None:
    for architecture in (BERT, "BertForMaskedLM"):
        model = auto_class(architecture).from_pretrained(quantized(architecture))
        before = outputs(model)
        assert same(outputs(copy.deepcopy(model)), before)
        other = copy.deepcopy(model)
        other.get_input_embeddings().weight.zero_()
        assert same(outputs(model), before) and not same(outputs(other), before)


def test_a_model_loaded_in_inference_mode(quantized: Quantized) -> None:
    wanted = outputs(AutoModelForSequenceClassification.from_pretrained(quantized(BERT)))
    with torch.inference_mode():
        model = AutoModelForSequenceClassification.from_pretrained(quantized(BERT))
        assert same(outputs(model), wanted)
    assert same(outputs(model), wanted)


# What is in memory and on disk


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "RobertaForMaskedLM", "CamembertForMaskedLM"])
def test_a_tied_head_is_stored_once(quantized: Quantized, architecture: str) -> None:
    folder = quantized(architecture)
    stored, modules = load_file(folder / WEIGHTS), quantization_config(folder)["modules"]
    model = AutoModelForMaskedLM.from_pretrained(folder)
    assert not any(name.endswith("decoder.weight") for name in stored)
    tables = [name for name, value in stored.items() if 65 in value.shape and value.dim() > 1]
    word = f"{model.base_model_prefix}.embeddings.word_embeddings"
    assert sorted(tables) == [f"{word}.weight", f"{word}.weight_scale"]
    head = model.get_output_embeddings()
    assert isinstance(head, QTiedLinear) and head.bias is not None and head._table[0] is model.get_input_embeddings()
    assert not model.config.tie_word_embeddings
    assert [path for path, module in modules.items() if module["type"] == "tied_linear"] == [
        "cls.predictions.decoder" if architecture.startswith("Bert") else "lm_head.decoder"
    ]
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    matrix = stored[f"{word}.weight"].squeeze(1).double() * stored[f"{word}.weight_scale"].double()
    wanted = hidden.double() @ matrix.T + head.bias.double()
    size = hidden.double().abs() @ matrix.abs().T + head.bias.double().abs()
    assert ((head(hidden).double() - wanted).abs() <= size * (32 + 3) * 2.0**-24).all()


class Watch(TorchDispatchMode):
    """Notes the shapes of all float tensors of two axes that are made in memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type != "meta" and out.is_floating_point() and out.dim() == 2:
            self.seen.add(tuple(out.shape))
        return out


@pytest.mark.parametrize("architecture", [BERT, "RobertaForSequenceClassification", "BertForMaskedLM", "BertModel"])
def test_float_weights_are_never_in_memory(
    quantized: Quantized, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # in this thread, where it is watched
    folder = quantized(architecture)
    modules = quantization_config(folder)["modules"]
    # The pooler and the transform of a head are 32 x 32 as well, and stay float.
    shapes = {tuple(module["shape"]) for module in modules.values() if "shape" in module} - {(32, 32)}
    assert shapes == {(65, 32), (40, 32), (3, 32), (48, 32), (32, 48)}
    watch = Watch()
    with watch:
        control = torch.ones(48, 32) + 1
        assert watch.seen == {tuple(control.shape)}
        watch.seen.clear()
        model = auto_class(architecture).from_pretrained(folder)
    assert not watch.seen & shapes, watch.seen & shapes
    floats = {name for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, torch.nn.Parameter)}
    assert not any(name.startswith(f"{path}.") for name in floats for path in modules)
    assert all(isinstance(model.get_submodule(path), QModule) for path in modules)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", [BERT, "RobertaForMaskedLM"])
def test_codes_and_what_keeps_its_type_stay_in_the_file(
    quantized: Quantized, architecture: str, dtype: torch.dtype
) -> None:
    """Loading is a memory map: the system reads pages when they are used, and may drop them again."""
    folder = quantized(architecture)
    model = auto_class(architecture).from_pretrained(folder, dtype=dtype)
    outputs(model, dtype)
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line.split()[0].split("-") for line in lines if line.endswith(str(folder / WEIGHTS))]
    ranges = [[int(end, 16) for end in ends] for ends in mapped]
    for name, value in model.state_dict().items():
        if dtype == torch.float32 or not value.is_floating_point():
            assert any(first <= value.data_ptr() < last for first, last in ranges), name


@pytest.mark.parametrize("architecture", CLASSES)
def test_a_float_parameter_answers_for_type_and_device(quantized: Quantized, architecture: str) -> None:
    model = auto_class(architecture).from_pretrained(quantized(architecture))
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)
    assert {value.device.type for value in [*model.parameters(), *model.buffers()]} == {"cpu"}


def test_pipelines_say_what_the_logits_say(quantized: Quantized) -> None:
    folder = quantized(BERT)
    said = transformers.pipeline("text-classification", str(folder))("w1 w2 w3")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        chances = model(**tokenizer("w1 w2 w3", return_tensors="pt")).logits.softmax(-1)[0]
    best = int(chances.argmax())
    assert said == [{"label": ("bad", "good")[best], "score": pytest.approx(chances[best].item(), rel=1e-6)}]


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "RobertaForMaskedLM"])
def test_fill_mask(quantized: Quantized, architecture: str) -> None:
    folder = quantized(architecture)
    said = transformers.pipeline("fill-mask", str(folder), top_k=3)("w1 [MASK] w3")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        top = model(**tokenizer("w1 [MASK] w3", return_tensors="pt")).logits[0, 2].softmax(-1).topk(3)
    assert [one["token"] for one in said] == top.indices.tolist()
    assert [one["score"] for one in said] == pytest.approx(top.values.tolist(), rel=1e-6)


def test_the_manifest_is_that_of_the_file(quantized: Quantized) -> None:
    for architecture in (BERT, "BertForMaskedLM"):
        folder = quantized(architecture)
        tensors = quantization_config(folder)["tensors"]
        check_manifest(weight_files(folder), tensors)
        assert sorted(tensors) == sorted(load_file(folder / WEIGHTS)) and damaged_tensors(folder) == []


def test_specs_in_the_config_can_be_read(quantized: Quantized) -> None:
    for module in quantization_config(quantized(BERT))["modules"].values():
        assert str(QuantSpec.parse(module["weights"])) == module["weights"]
