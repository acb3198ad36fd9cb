"""Headprune: the artifact computes what the masked float model does, alone and before the methods that quantize."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import qtool.hf  # noqa: F401 (artifacts load as ordinary models from here on)
from qtool import kernels
from qtool.analysis.heads import without
from qtool.errors import InputError
from qtool.methods.headprune import read_heads
from qtool.nn.fused import FloatPlan
from qtool.nn.integer.plan import IntPlan

Command = Callable[..., Any]
IDS = torch.randint(5, 65, (16, 7), generator=torch.Generator().manual_seed(0))
IDS[4:8, 3:] = 0
BATCH = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
HEADS = {0: [1], 1: [0, 1, 2, 3], 2: [0, 3]}
OPTIONS: dict[str, dict[str, Any]] = {"LlamaForCausalLM": {"num_key_value_heads": 2}}
RANDOM = ("--set", "calibration.source=random", "--num-samples", "32")
GROUPED = {0: [1], 1: [0, 1]}


@pytest.fixture(scope="module")
def model(shelf: Any) -> Callable[[str], Path]:
    """Float models with 4 heads of 16 channels in each of 3 layers."""

    def make(architecture: str) -> Path:
        name = f"prunable-{architecture}"
        if not (shelf.folder / name).exists():
            options: dict[str, Any] = {"num_attention_heads": 4, "num_hidden_layers": 3, "hidden_size": 64}
            options |= {"intermediate_size": 64, "initializer_range": 0.1}
            causal = architecture.endswith(("LMHeadModel", "CausalLM"))
            make = shelf.causal if causal else shelf.make
            make(name, architecture, change=shelf.noise(0.05), **{**options, **OPTIONS.get(architecture, {})})
        folder: Path = shelf.folder / name
        return folder

    return make


def said(heads: dict[int, list[int]]) -> str:
    return f"methods.headprune.heads={json.dumps({str(layer): own for layer, own in heads.items()})}"


def pruned(command: Command, source: Path, heads: dict[int, list[int]], *arguments: str, out: str = "out") -> Path:
    """The folder of an artifact."""
    ended = command("quantize", source, "--method", "headprune", "--set", said(heads), "-o", out, *arguments)
    assert ended.code == 0, ended.err
    return Path(out)


def loaded(folder: Path, architecture: str) -> Any:
    return getattr(transformers, architecture).from_pretrained(folder).eval()


def outputs(network: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = network(**BATCH)[0]
    return found


def masked(source: Path, architecture: str, heads: dict[int, list[int]]) -> torch.Tensor:
    network = loaded(source, architecture)
    with without(network, frozenset((layer, head) for layer, own in heads.items() for head in own)):
        return outputs(network)


@pytest.mark.parametrize(
    "architecture",
    ["BertForSequenceClassification", "RobertaForMaskedLM", "DistilBertModel", "GPT2LMHeadModel", "LlamaForCausalLM"],
)
def test_alone_it_is_the_masked_model_but_smaller(
    architecture: str, model: Callable[[str], Path], desk: Path, qtool_command: Command
) -> None:
    source, heads = model(architecture), GROUPED if "Llama" in architecture else HEADS
    out = pruned(qtool_command, source, heads)
    network = loaded(out, architecture)
    assert type(network) is getattr(transformers, architecture)
    assert torch.allclose(outputs(network), masked(source, architecture, heads), atol=2e-5, rtol=1e-5)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert sum(t.numel() for t in after.values()) < sum(t.numel() for t in before.values())
    network.save_pretrained("again")
    again = loaded(Path("again"), architecture)
    assert torch.equal(outputs(again), outputs(network))
    recorded = json.loads((out / "config.json").read_text())["quantization_config"]
    assert recorded["pruned_heads"] == {str(layer): own for layer, own in heads.items()}
    assert recorded["methods"] == ["headprune"]


def test_the_base_model_loads_on_its_own(model: Callable[[str], Path], desk: Path, qtool_command: Command) -> None:
    out = pruned(qtool_command, model("BertForSequenceClassification"), HEADS)
    base, whole = transformers.AutoModel.from_pretrained(out).eval(), loaded(out, "BertForSequenceClassification")
    assert torch.equal(outputs(base), outputs(whole.bert))
    base.save_pretrained("base")
    assert torch.equal(outputs(transformers.AutoModel.from_pretrained("base").eval()), outputs(base))


def test_a_pruned_float_model_can_be_trained_and_written_on(
    model: Callable[[str], Path], desk: Path, qtool_command: Command
) -> None:
    out = pruned(qtool_command, model("GPT2LMHeadModel"), {0: [0, 1, 2, 3]})
    network = loaded(out, "GPT2LMHeadModel")
    network(**BATCH, labels=IDS).loss.backward()
    assert network.transformer.h[1].attn.c_attn.weight.grad is not None
    assert network.hf_quantizer.is_trainable
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with_cache = network.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), **options)
    network.config.use_cache = network.generation_config.use_cache = False
    assert torch.equal(network.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), **options), with_cache)


@pytest.mark.parametrize("heads", [HEADS, {0: [1], 2: [0, 3]}])
@pytest.mark.parametrize("preset", ["zeroquant-w8a8", "zeroquant-w4a8"])
def test_before_zeroquant_in_one_native_call(
    preset: str, heads: dict[int, list[int]], model: Callable[[str], Path], desk: Path, qtool_command: Command
) -> None:
    architecture = "BertForSequenceClassification"
    source = model(architecture)
    sets = ("--set", "weights.group_size=32") if "w4" in preset else ()
    out = pruned(qtool_command, source, heads, "--method", "zeroquant", "-c", preset, *sets)
    network = loaded(out, architecture)
    joined = outputs(network)
    if kernels.backend().name == "native":
        assert isinstance(network.bert.encoder._plan, FloatPlan)
    with kernels.using("reference"):
        one_by_one = outputs(network)
    assert torch.allclose(joined, one_by_one, atol=2e-2)
    exact = masked(source, architecture, heads)
    noise = {"zeroquant-w8a8": 0.05, "zeroquant-w4a8": 0.4}[preset]
    assert (joined - exact).norm() < noise * exact.norm()


def test_codes_are_those_of_the_sliced_matrices(
    model: Callable[[str], Path], desk: Path, qtool_command: Command
) -> None:
    """Scales of the output projection's rows come from the columns that stay."""
    source = model("BertForSequenceClassification")
    stored = load_file(pruned(qtool_command, source, {0: [1, 2]}, "--method", "zeroquant") / "model.safetensors")
    floats = load_file(source / "model.safetensors")
    kept = [*range(16), *range(48, 64)]
    path = "bert.encoder.layer.0.attention"
    columns = floats[f"{path}.output.dense.weight"][:, kept]
    rows = floats[f"{path}.self.query.weight"][kept]
    assert torch.equal(stored[f"{path}.output.dense.weight_scale"].flatten(), columns.abs().amax(1) / 127)
    assert torch.equal(stored[f"{path}.self.query.weight_scale"].flatten(), rows.abs().amax(1) / 127)
    assert torch.equal(stored[f"{path}.self.query.bias"], floats[f"{path}.self.query.bias"][kept])
    assert torch.equal(stored[f"{path}.output.dense.bias"], floats[f"{path}.output.dense.bias"])


@pytest.mark.parametrize("heads", [HEADS, {0: [1], 2: [0, 3]}])
def test_before_int8_attention(
    heads: dict[int, list[int]], model: Callable[[str], Path], desk: Path, qtool_command: Command
) -> None:
    architecture = "BertForSequenceClassification"
    source = model(architecture)
    chosen = ("--method", "zeroquant", "-c", "zeroquant-w8a8-full", *RANDOM)
    network = loaded(pruned(qtool_command, source, heads, *chosen), architecture)
    exact = masked(source, architecture, heads)
    assert (outputs(network) - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("heads", [HEADS, {0: [1], 2: [0, 3]}])
def test_before_codes_of_attention(
    heads: dict[int, list[int]], model: Callable[[str], Path], desk: Path, qtool_command: Command
) -> None:
    architecture = "BertForSequenceClassification"
    source = model(architecture)
    network = loaded(pruned(qtool_command, source, heads, "--method", "logattn", *RANDOM), architecture)
    exact = masked(source, architecture, heads)
    assert 0 < (outputs(network) - exact).norm() < 0.2 * exact.norm()


def test_before_ibert_the_integers_are_the_same_everywhere(
    model: Callable[[str], Path], desk: Path, qtool_command: Command
) -> None:
    architecture, heads = "BertForSequenceClassification", {0: [1], 2: [0, 1, 3]}
    source = model(architecture)
    out = pruned(qtool_command, source, heads, "--method", "ibert", *RANDOM)
    network = loaded(out, architecture)
    joined = outputs(network)
    if kernels.backend().name == "native":
        assert isinstance(network.bert.embeddings._plan, IntPlan)
    with kernels.using("reference"):
        assert torch.equal(outputs(network), joined)
    exact = masked(source, architecture, heads)
    assert (joined - exact).norm() < 0.1 * exact.norm()


def test_decoders_run_joined(model: Callable[[str], Path], desk: Path, qtool_command: Command) -> None:
    architecture, heads = "LlamaForCausalLM", GROUPED
    source = model(architecture)
    network = loaded(pruned(qtool_command, source, heads, "--method", "zeroquant"), architecture)
    exact = masked(source, architecture, heads)
    assert (outputs(network) - exact).norm() < 0.1 * exact.norm()


def test_the_order_of_methods_and_the_file_do_not_matter(
    model: Callable[[str], Path], desk: Path, qtool_command: Command
) -> None:
    source = model("BertForSequenceClassification")
    first = pruned(qtool_command, source, HEADS, "--method", "zeroquant")
    Path("heads.json").write_text(json.dumps({"heads": {str(layer): own for layer, own in HEADS.items()}}))
    chosen = ("--method", "zeroquant", "--method", "headprune", "--set", "methods.headprune.file=heads.json")
    ended = qtool_command("quantize", source, *chosen, "-o", "second")
    assert ended.code == 0, ended.err
    assert (first / "model.safetensors").read_bytes() == Path("second/model.safetensors").read_bytes()
    assert json.loads(Path("second/config.json").read_text())["quantization_config"]["methods"][0] == "headprune"
    card = Path("second/README.md").read_text()
    assert "heads.json" not in card and "headprune" in card
    recipe = json.loads(Path("second/qtool.json").read_text())["recipe"]["methods"]
    options = {method["name"]: method for method in recipe}["headprune"]
    assert options["heads"] == {str(layer): own for layer, own in HEADS.items()} and "file" not in options


def test_inspect_says_what_is_missing(model: Callable[[str], Path], desk: Path, qtool_command: Command) -> None:
    out = pruned(qtool_command, model("BertForSequenceClassification"), HEADS)
    ended = qtool_command("inspect", out, "--verify", "--json", "-")
    assert ended.code == 0, ended.err
    body = json.loads(ended.out)
    assert body["pruned_heads"] == {str(layer): own for layer, own in HEADS.items()}
    assert body["checks"]["golden batch"] == "agrees"
    shown = qtool_command("inspect", out)
    assert "7 attention heads removed" in shown.out
    proof = qtool_command("inspect", out, "--prove-integer")
    assert proof.code == 3 and len(proof.errors) == 1


def test_a_dry_run_tells_the_size(model: Callable[[str], Path], desk: Path, qtool_command: Command) -> None:
    source = model("BertForSequenceClassification")
    chosen = ("--method", "headprune", "--set", said(HEADS))
    predicted = json.loads(qtool_command("quantize", source, *chosen, "--dry-run", "--json", "-").out)
    out = pruned(qtool_command, source, HEADS)
    assert predicted["size_bytes"] == (out / "model.safetensors").stat().st_size
    assert predicted["methods"] == ["headprune"]
    assert qtool_command("quantize", source, *chosen, "--dry-run").code == 0


@pytest.mark.parametrize(
    ("sets", "wanted"),
    [
        ((), "methods.headprune.heads: name the heads to remove"),
        (('methods.headprune.heads={"7": [0]}',), "there is no layer 7"),
        (('methods.headprune.heads={"0": [4]}',), "layer 0 has no head 4"),
        (('methods.headprune.heads={"0": []}',), "no head is to be removed"),
        (('methods.headprune.heads={"0": [-1]}',), "methods.headprune.heads"),
        (("methods.headprune.file=nowhere.json",), "no file nowhere.json"),
    ],
)  # fmt: skip
def test_nonsense_is_one_line(
    sets: tuple[str, ...], wanted: str, model: Callable[[str], Path], desk: Path, qtool_command: Command
) -> None:
    arguments = [word for one in sets for word in ("--set", one)]
    source = model("BertForSequenceClassification")
    ended = qtool_command("quantize", source, "--method", "headprune", *arguments, "-o", "out")
    assert ended.code == 3
    assert len(ended.errors) == 1 and wanted in ended.errors[0]
    assert not Path("out").exists()


def test_a_layer_without_heads_is_not_for_ibert(
    model: Callable[[str], Path], desk: Path, qtool_command: Command
) -> None:
    chosen = ("--method", "headprune", "--method", "ibert", "--set", said(HEADS))
    ended = qtool_command("quantize", model("BertForSequenceClassification"), *chosen, "-o", "out")
    assert (ended.code, len(ended.errors)) == (3, 1)
    assert "block.1, which lost all of its heads" in ended.errors[0]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"heads": [1]}', '{"heads": {"a": [1]}}', '{"heads": {"0": [1.5]}}', '{"heads": {}}']
)
def test_files_that_name_no_heads_are_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "heads.json"
    file.write_text(text)
    with pytest.raises(InputError, match=r"methods\.headprune\.file"):
        read_heads(file)


@pytest.mark.parametrize("damage", [{"0": 3}, {"x": [1]}, [1], {"0": [-1]}, {"0": [True]}])
def test_a_damaged_record_is_found(
    damage: Any, model: Callable[[str], Path], desk: Path, qtool_command: Command
) -> None:
    out = pruned(qtool_command, model("BertForSequenceClassification"), {0: [1]})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["pruned_heads"] = damage
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="which heads are missing"):
        loaded(out, "BertForSequenceClassification")


def test_other_heads_than_the_recorded_do_not_load(
    model: Callable[[str], Path], desk: Path, qtool_command: Command
) -> None:
    out = pruned(qtool_command, model("BertForSequenceClassification"), {0: [1]})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["pruned_heads"] = {"0": [1, 2]}
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        loaded(out, "BertForSequenceClassification")


def test_resume_notices_other_heads(model: Callable[[str], Path], desk: Path, qtool_command: Command) -> None:
    source = model("BertForSequenceClassification")
    Path("out.qtool-run").mkdir()
    pruned(qtool_command, source, {0: [1]}, out="first")
    fingerprint = json.loads(Path("first/qtool.json").read_text())["fingerprint"]
    Path("out.qtool-run/run.json").write_text(json.dumps({"fingerprint": fingerprint}))
    chosen = ("--method", "headprune", "--set", said({0: [2]}), "-o", "out", "--resume")
    ended = qtool_command("quantize", source, *chosen)
    assert ended.code == 3 and "different recipe" in ended.errors[0]
