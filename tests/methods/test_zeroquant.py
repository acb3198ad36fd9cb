"""ZeroQuant: every stored integer and scale against float64, what it refuses, and what it says stays in float."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file

from qtool.api import calibration_batches, open_job, resolve_recipe
from qtool.errors import InputError
from qtool.job import Job

Command = Callable[..., Any]
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

ARCHITECTURES = [
    "BertForSequenceClassification", "BertForMaskedLM", "BertModel",
    "RobertaForSequenceClassification", "RobertaForMaskedLM", "RobertaModel",
    "XLMRobertaForSequenceClassification", "CamembertForMaskedLM",
]  # fmt: skip
LINEARS = (
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "intermediate.dense", "output.dense",
)  # fmt: skip
TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")


def grid(weight: torch.Tensor, qmax: int, rows: int, columns: int) -> tuple[Integers, NDArray[np.float32]]:
    """Codes and scales of a matrix in blocks of rows × columns, one block after the other, in float64."""
    values: Floats = weight.double().numpy()
    codes = np.zeros(values.shape, np.int64)
    scales = np.zeros((values.shape[0] // rows, values.shape[1] // columns), np.float32)
    for i, j in np.ndindex(*scales.shape):
        block = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        peak = np.abs(values[block]).max()
        scales[i, j] = peak / qmax if peak > 0 else 1
        codes[block] = np.clip(np.floor(values[block] / np.float64(scales[i, j]) + 0.5), -qmax, qmax)
    return codes, scales


def tiled(codes: Integers) -> Integers:
    """`[rows/16, columns/4, 16, 4]`, padded with zeros, filled element by element."""
    rows, columns = codes.shape
    tiles = np.zeros((-(-rows // 16), -(-columns // 4), 16, 4), np.int64)
    for i, j in np.ndindex(rows, columns):
        tiles[i // 16, j // 4, i % 16, j % 4] = codes[i, j]
    return tiles


def base_prefix(architecture: str) -> str:
    if architecture.endswith("Model"):
        return ""
    return "bert." if architecture.startswith("Bert") else "roberta."


def linear_paths(architecture: str) -> list[str]:
    return [f"{base_prefix(architecture)}encoder.layer.{layer}.{part}" for layer in range(2) for part in LINEARS]


def quantized(command: Command, model: Path, *arguments: str, out: str = "out") -> dict[str, torch.Tensor]:
    """The tensors of the artifact that `qtool quantize` makes in `out`."""
    ended = command("quantize", model, "-o", out, *arguments)
    assert ended.code == 0, ended.err
    return dict(load_file(Path(out) / "model.safetensors"))


def emulated(model: Path, stored: dict[str, torch.Tensor], texts: list[str]) -> torch.Tensor:
    """Logits in float64 of the float model with the stored matrices written out, and its inputs rounded as they are."""
    own = transformers.AutoTokenizer.from_pretrained(model)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(model).double().eval()
    for path in {name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")}:
        module = network.get_submodule(path)
        module.weight.data = expanded(stored, path, tuple(module.weight.shape))
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(rounding(stored.get(f"{path}.act_scale")))
    rows = []
    for text in texts:
        with torch.no_grad():
            rows.append(network(**own(text, return_tensors="pt", truncation=True, max_length=38)).logits[0])
    return torch.stack(rows)


def expanded(stored: dict[str, torch.Tensor], path: str, shape: tuple[int, int]) -> torch.Tensor:
    """Codes times scales, element by element, of a tiled matrix or of a table."""
    codes, scales = stored[f"{path}.weight"].double(), stored[f"{path}.weight_scale"].double()
    if stored[f"{path}.weight"].dtype == torch.uint8:
        nibbles = torch.stack([codes % 16, codes.div(16).floor()], -1).flatten(-2)
        codes = torch.where(nibbles > 7, nibbles - 16, nibbles)
    if codes.dim() == 4:
        codes = codes.permute(0, 2, 1, 3).reshape(codes.shape[0] * 16, -1)
    codes = codes.reshape(codes.shape[0], -1)[: shape[0], : shape[1]]
    repeated = scales.repeat_interleave(shape[0] // scales.shape[0], 0)
    return codes * repeated.repeat_interleave(shape[1] // scales.shape[1], 1)


def rounding(static: torch.Tensor | None) -> Callable[..., Any]:
    def hook(module: Any, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
        (x,) = args
        scale = x.abs().amax(-1, keepdim=True) / 127 if static is None else static.double()
        return torch.floor(x / scale + 0.5).clamp(-127, 127) * scale

    return hook


def check_logits(model: Path, out: Path, stored: dict[str, torch.Tensor], zoo: Any, *, limit: float) -> None:
    """The artifact computes what it stores, up to float32, and that is within `limit` of the float model."""
    texts = zoo.sentences(40, seed=3)
    exact, found = zoo.plain(model, texts), zoo.plain(out, texts)
    assert rms(found - emulated(model, stored, texts)) < 0.01 * rms(exact)
    assert rms(found - exact) < limit * rms(exact)


def rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.fixture
def model(zoo: Any) -> Path:
    """A classifier with biases: transformers initialises them to zero."""
    made: Path = zoo.make("model", labels=("negative", "positive"), change=zoo.noise(0.05))
    return made


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_is_the_one_that_float64_gives(
    architecture: str, zoo: Any, desk: Path, qtool_command: Command
) -> None:
    source = zoo.make("model", architecture, change=zoo.noise(0.05))
    floats = getattr(transformers, architecture).from_pretrained(source).state_dict()
    stored = quantized(qtool_command, source, "--method", "zeroquant")
    expected: dict[str, Any] = {}
    for path in linear_paths(architecture):
        weight = floats[f"{path}.weight"]
        codes, expected[f"{path}.weight_scale"] = grid(weight, 127, 1, weight.shape[1])
        expected[f"{path}.weight"] = tiled(codes).astype(np.int8)
        expected[f"{path}.bias"] = floats[f"{path}.bias"].numpy()
    for name in TABLES:
        path = f"{base_prefix(architecture)}embeddings.{name}"
        weight = floats[f"{path}.weight"]
        wide = name != "word_embeddings"
        codes, expected[f"{path}.weight_scale"] = grid(weight, 32767 if wide else 127, 1, weight.shape[1])
        expected[f"{path}.weight"] = codes[:, None, :].astype(np.int16 if wide else np.int8)
    for name, tensor in stored.items():
        if name in expected:
            wanted = expected.pop(name)
            assert tensor.numpy().dtype == wanted.dtype, name
            np.testing.assert_array_equal(tensor.numpy(), wanted, err_msg=name)
        else:
            assert torch.equal(tensor, floats[name]), f"{name} is float and was changed"
    assert not expected, "these were not stored"


# A spelling of the weights, and the rows × columns that share a scale in a matrix of `shape`.
BLOCKS = {
    "int8:tensor:sym": lambda shape: (127, *shape),
    "int8:channel:sym": lambda shape: (127, 1, shape[1]),
    "int8:group:16:sym": lambda shape: (127, 1, 16),
    "int8:rows:4:sym": lambda shape: (127, 4, shape[1]),
    "int8:block:8x16:sym": lambda shape: (127, 8, 16),
    "int6:channel:sym": lambda shape: (31, 1, shape[1]),
    "int5:group:8:sym": lambda shape: (15, 1, 8),
    "int4:group:8:sym": lambda shape: (7, 1, 8),
    "int4:channel:sym": lambda shape: (7, 1, shape[1]),
    "int3:group:4:sym": lambda shape: (3, 1, 4),
}
LIMITS = {"int8": 0.2, "int6": 0.4, "int5": 0.5, "int4": 1.0, "int3": 1.2}  # of a tiny random model's logits


def two_a_byte(codes: Integers) -> Integers:
    """The low nibble is the code of the even column, in two's complement."""
    return (codes[..., 0::2] & 15) + 16 * (codes[..., 1::2] & 15)


@pytest.mark.parametrize("spelling", BLOCKS)
def test_every_block_shape_is_stored_and_runs(
    spelling: str, model: Path, desk: Path, qtool_command: Command, zoo: Any
) -> None:
    stored = quantized(qtool_command, model, "--method", "zeroquant", "--set", f"weights={spelling}")
    floats = load_file(model / "model.safetensors")
    for path in linear_paths("BertForSequenceClassification"):
        weight = floats[f"{path}.weight"]
        codes, scales = grid(weight, *BLOCKS[spelling](weight.shape))
        wanted = tiled(codes) if spelling > "int5" else two_a_byte(tiled(codes))
        np.testing.assert_array_equal(stored[f"{path}.weight"].numpy(), wanted)
        np.testing.assert_array_equal(stored[f"{path}.weight_scale"].numpy(), scales)
    check_logits(model, desk / "out", stored, zoo, limit=LIMITS[spelling[:4]])


def figures(folder: Path) -> dict[str, float]:
    """Signal-to-noise of the weights in dB by module path."""
    report = json.loads((folder / "qtool.json").read_text())
    return {path: found["weight_sqnr_db"] for path, found in report["figures"].items()}


def test_smaller_blocks_lose_less(model: Path, desk: Path, qtool_command: Command) -> None:
    spellings = ["int6:tensor:sym", "int6:rows:4:sym", "int6:channel:sym", "int6:group:8:sym", "int8:group:8:sym"]
    found = []
    for number, spelling in enumerate(spellings):
        out = f"out{number}"
        quantized(qtool_command, model, "--method", "zeroquant", "--set", f"weights={spelling}", out=out)
        found.append(figures(desk / out))
    paths = linear_paths("BertForSequenceClassification")
    for coarse, fine in itertools.pairwise(found):
        assert sum(fine[path] for path in paths) > sum(coarse[path] for path in paths)


def test_the_reported_figures_are_signal_to_noise(model: Path, desk: Path, qtool_command: Command) -> None:
    stored = quantized(qtool_command, model, "--method", "zeroquant")
    floats = load_file(model / "model.safetensors")
    found = figures(desk / "out")
    paths = linear_paths("BertForSequenceClassification")
    assert set(found) == {*paths, *(f"bert.embeddings.{name}" for name in TABLES)}
    for path in paths:
        weight: Floats = floats[f"{path}.weight"].double().numpy()
        codes, _ = grid(floats[f"{path}.weight"], 127, 1, weight.shape[1])
        noise = weight - codes * stored[f"{path}.weight_scale"].double().numpy()
        assert found[path] == pytest.approx(10 * np.log10((weight**2).sum() / (noise**2).sum()), abs=0.02)


def test_rules_are_applied_and_the_rest_is_untouched(model: Path, desk: Path, qtool_command: Command, zoo: Any) -> None:
    rules = "{'*.layer.1.*': float, '*.query': {weights: 'int8:group:16:sym', keep_float: false}, '*position*': float}"
    arguments = ("--method", "zeroquant", "--set", f"rules={rules}")
    stored = quantized(qtool_command, model, *arguments)
    floats = load_file(model / "model.safetensors")
    plain = quantized(qtool_command, model, "--method", "zeroquant", out="plain")
    for path in linear_paths("BertForSequenceClassification"):
        if path.endswith("query"):
            codes, scales = grid(floats[f"{path}.weight"], 127, 1, 16)
            np.testing.assert_array_equal(stored[f"{path}.weight"].numpy(), tiled(codes))
            np.testing.assert_array_equal(stored[f"{path}.weight_scale"].numpy(), scales)
        elif ".layer.1." in path:
            assert torch.equal(stored[f"{path}.weight"], floats[f"{path}.weight"])
            assert f"{path}.weight_scale" not in stored
        else:
            assert torch.equal(stored[f"{path}.weight"], plain[f"{path}.weight"])
    name = "bert.embeddings.position_embeddings.weight"
    assert torch.equal(stored[name], floats[name])
    check_logits(model, desk / "out", stored, zoo, limit=0.2)
    kept = json.loads((desk / "out" / "qtool.json").read_text())["kept_float"]
    assert kept["bert.embeddings.position_embeddings"] == "asked for by a rule or an option"


def test_int4_in_the_feed_forward_layers_alone(model: Path, desk: Path, qtool_command: Command, zoo: Any) -> None:
    groups = ("-c", "zeroquant-w4a8", "--set", "rules={'part:ffn.*': {weights: 'int4:group:16:sym'}}")
    stored = quantized(qtool_command, model, *groups)
    for path in linear_paths("BertForSequenceClassification"):
        narrow = "attention" not in path
        assert stored[f"{path}.weight"].dtype == (torch.uint8 if narrow else torch.int8), path
        assert stored[f"{path}.weight_scale"].shape[1] == (stored[f"{path}.weight"].shape[1] // 4 if narrow else 1)
    check_logits(model, desk / "out", stored, zoo, limit=0.6)
    quantized(qtool_command, model, *groups, "--set", "weights.rounding=nearest", out="nearest")
    clipped, plain = figures(desk / "out"), figures(desk / "nearest")
    for path in linear_paths("BertForSequenceClassification"):
        assert clipped[path] > plain[path] if "attention" not in path else clipped[path] >= plain[path]


def job(model: Path, *sets: str, config: str | None = None) -> Job:
    methods = () if config else ("zeroquant",)
    return open_job(str(model), resolve_recipe(config=config, methods=methods, sets=sets))


QUERY = "bert.encoder.layer.0.attention.self.query"
WORDS = "bert.embeddings.word_embeddings"

REFUSED = [
    ("weights=int8:rows:5:sym", rf"{QUERY}: groups of 5 rows do not divide 32 rows"),
    ("weights=int8:block:5x8:sym", rf"{QUERY}: groups of 5 rows"),
    ("weights.scale_rule=zeroqant", r"weights\.scale_rule"),
    ("weights={rounding: mse, scale_rule: zeroquant}", r"weights: scale_rule zeroquant needs rounding nearest; mse"),
    ("weights=int9:channel:sym", rf"{QUERY}: weights int9:channel:sym cannot run; zeroquant takes .* int2 to int8"),
    ("weights=int16:channel:sym", rf"{QUERY}: weights int16:channel:sym cannot run"),
    ("weights.rounding=gptp", r"weights\.rounding"),
    (
        "rules={'part:ffn.middle': float}",
        r"rule 'part:ffn\.middle' matches no part of this model; it has word, ",
    ),
    ("weights=int9:channel:asym", rf"{QUERY}: weights int9:channel:asym cannot run; zeroquant takes .*"),
    ("weights={symmetric: true, minimum: true}", r"minimum: true is not symmetric"),
    ("weights=int8:token:sym", rf"{QUERY}: weights int8:token:sym cannot run; zeroquant takes static"),
    ("activations=int8:token:asym", rf"{QUERY}: activations int8:token:asym cannot run; use int8:token:sym, int8:t"),
    ("activations=int4:token:sym", rf"{QUERY}: activations int4:token:sym cannot run"),
    ("activations=int8:group:16:sym", rf"{QUERY}: activations int8:group:16:sym cannot run"),
    ("activations=int8:channel:sym", rf"{QUERY}: activations int8:channel:sym cannot run"),
    ("activations=int8:tensor:sym:dynamic", rf"{QUERY}: activations int8:tensor:sym:dynamic cannot run"),
    ("methods.zeroquant.word_embeddings=int4:channel:sym", rf"{WORDS}: weights int4:channel:sym cannot run"),
    ("methods.zeroquant.word_embeddings=int8:group:16:sym", rf"{WORDS}: weights int8:group:16:sym cannot run"),
    ("methods.zeroquant.word_embeddings=int8:rows:7:sym", rf"{WORDS}: groups of 7 rows do not divide 65 rows"),
    ("methods.zeroquant.small_embeddings=int8:channel:asym", r"bert\.embeddings\.position_embeddings: weights"),
    ("methods.zeroquant.word_embeddings=flaot", r"methods\.zeroquant\.word_embeddings"),
    ("methods.zeroquant.word_embedding=float", r"methods\.zeroquant\..*did you mean word_embeddings"),
    (
        "methods.zeroquant.lkdd=true",
        r"methods\.zeroquant\..*unknown option 'lkdd'; did you mean lkd",
    ),
    ("rules={'*.layer.1.attention.self.key': {weights: int9:channel:sym}}", r"layer\.1\.attention\.self\.key: wei"),
    ("rules={'*.qeury': float}", r"rule '\*\.qeury' matches no module that can be quantized; near misses: .*query"),
    ("rules={'classifier': float}", "rule 'classifier' matches no module that can be quantized"),
    ("methods=[zeroquant, zeroquant]", "method zeroquant is there twice"),
]


@pytest.mark.parametrize(("pair", "said"), REFUSED)
def test_what_cannot_run_is_refused_by_name(pair: str, said: str, tiny: Any) -> None:
    with pytest.raises(InputError, match=said) as caught:
        job(tiny.model, pair)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("sets", [(), ("methods.zeroquant.word_embeddings=float", "rules={'*.1.*': float}")])
def test_the_plan_accounts_for_every_parameter(architecture: str, sets: tuple[str, ...], shelf: Any) -> None:
    found = job(shelf.make(architecture, architecture), *sets)
    plan = found.plan
    assert not set(plan.modules) & set(plan.kept_float)
    assert all(plan.kept_float.values()), "a reason for each"

    owners = {name.rpartition(".")[0] for name, _ in found.model.named_parameters(remove_duplicate=False)}
    assert owners == {*plan.modules, *plan.kept_float}
    # Matrices that stay float are those of the head, and what was asked for.
    for path in plan.kept_float:
        module = found.model.get_submodule(path)
        matrix = isinstance(module, torch.nn.Linear | torch.nn.Embedding)
        asked = plan.kept_float[path] == "asked for by a rule or an option"
        assert not matrix or asked or path not in {part.path for _, part in found.anatomy.parts()}


def test_static_scales_are_the_largest_input_over_127(tiny: Any, desk: Path, qtool_command: Command) -> None:
    arguments = ("-c", "zeroquant-w8a8-static", "--task", "sst2", "--data", str(tiny.data))
    stored = quantized(qtool_command, tiny.model, *arguments)
    recipe = resolve_recipe(config="zeroquant-w8a8-static", flags={"task": "sst2", "data": tiny.data})
    batches = calibration_batches(open_job(str(tiny.model), recipe)).batches
    assert any((batch["attention_mask"] == 0).any() for batch in batches), "some padding to leave out"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny.model).eval()
    paths = linear_paths("BertForSequenceClassification")
    largest = dict.fromkeys(paths, 0.0)
    real = torch.empty(0)

    def watch(path: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            largest[path] = max(largest[path], float(args[0][real].abs().max()))

        return hook

    for path in paths:
        model.get_submodule(path).register_forward_pre_hook(watch(path))
    for batch in batches:
        real = batch["attention_mask"].bool()
        with torch.no_grad():
            model(**batch)
    for path in paths:
        assert stored[f"{path}.act_scale"].shape == (1,)
        assert stored[f"{path}.act_scale"].item() == pytest.approx(largest[path] / 127, rel=1e-6), path


def test_static_activations_score_sensibly_and_dynamic_ones_store_no_scale(
    tiny: Any, desk: Path, qtool_command: Command, zoo: Any
) -> None:
    data = ("--task", "sst2", "--data", str(tiny.data))
    static = quantized(qtool_command, tiny.model, "-c", "zeroquant-w8a8-static", *data)
    dynamic = quantized(qtool_command, tiny.model, "-c", "zeroquant-w8a8", *data, out="dynamic")
    assert not [name for name in dynamic if name.endswith("act_scale")]
    check_logits(tiny.model, desk / "out", static, zoo, limit=0.3)
    check_logits(tiny.model, desk / "dynamic", dynamic, zoo, limit=0.2)


def test_one_layer_static_the_others_dynamic(tiny: Any, desk: Path, qtool_command: Command) -> None:
    rule = "rules={'*.layer.1.output.dense': {activations: 'int8:tensor:sym'}}"
    stored = quantized(qtool_command, tiny.model, "--method", "zeroquant", "--set", rule)
    assert [name for name in stored if name.endswith("act_scale")] == ["bert.encoder.layer.1.output.dense.act_scale"]


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "RobertaForMaskedLM"])
@pytest.mark.parametrize("table", ["int8:channel:sym", "int16:channel:sym", "int8:rows:5:sym", "float"])
def test_a_tied_head_follows_its_table(
    architecture: str, table: str, zoo: Any, desk: Path, qtool_command: Command
) -> None:
    source = zoo.make("mlm", architecture, change=zoo.noise(0.05))
    stored = quantized(
        qtool_command, source, "--method", "zeroquant", "--set", f"methods.zeroquant.word_embeddings={table}"
    )
    assert not [name for name in stored if "decoder.weight" in name], "the table is stored once"
    name = f"{base_prefix(architecture)}embeddings.word_embeddings.weight"
    assert stored[name].dtype == {"float": torch.float32, "int16": torch.int16}.get(table.split(":")[0], torch.int8)
    cls = getattr(transformers, architecture)
    exact, found = cls.from_pretrained(source).eval(), cls.from_pretrained(desk / "out").eval()
    ids = torch.randint(5, 65, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, logits = exact(ids).logits, found(ids).logits
    assert rms(logits - expected) < 0.15 * rms(expected)
    assert (logits.argmax(-1) == expected.argmax(-1)).float().mean() >= 0.9


def test_every_tensor_of_a_gpt2_is_the_one_that_float64_gives(zoo: Any, desk: Path, qtool_command: Command) -> None:
    """Conv1D stores `[in, out]`: codes are those of the transposed matrix, a scale for each output."""
    source = zoo.make("model", "GPT2LMHeadModel", change=zoo.noise(0.05), bos_token_id=1, eos_token_id=2)
    floats = transformers.GPT2LMHeadModel.from_pretrained(source).state_dict()
    stored = quantized(qtool_command, source, "--method", "zeroquant")
    for layer, name in itertools.product(range(2), ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")):
        path = f"transformer.h.{layer}.{name}"
        weight = floats[f"{path}.weight"].t()
        codes, scales = grid(weight, 127, 1, weight.shape[1])
        np.testing.assert_array_equal(stored.pop(f"{path}.weight").numpy(), tiled(codes), err_msg=path)
        np.testing.assert_array_equal(stored.pop(f"{path}.weight_scale").numpy(), scales)
        assert torch.equal(stored.pop(f"{path}.bias"), floats[f"{path}.bias"])
    tables = {name for name in stored if ".wte." in name or ".wpe." in name}
    assert len(tables) == 4
    assert {name for name in stored if name not in tables} == {name for name in floats if ".ln_" in name}


def test_a_rule_names_a_fused_matrix_once(shelf: Any) -> None:
    source = shelf.make("rule-gpt2", "GPT2LMHeadModel", bos_token_id=1, eos_token_id=2)
    plan = job(source, "rules={'*.0.attn.c_attn': float, '*.c_proj': {weights: 'int8:group:16:sym'}}").plan
    assert plan.kept_float["transformer.h.0.attn.c_attn"] == "asked for by a rule or an option"
    assert plan.modules["transformer.h.1.attn.c_attn"]["shape"] == [96, 32]
    assert plan.modules["transformer.h.1.mlp.c_proj"]["weights"] == "int8:group:16:sym"


@pytest.mark.parametrize(
    ("architecture", "path", "said"),
    [
        ("OPTForCausalLM", "model.decoder.embed_positions", "OPTLearnedPositionalEmbedding: its forward is not the p"),
        ("OPTForCausalLM", "model.decoder.project_in", "beside the word table"),
        ("Gemma2ForCausalLM", "model.embed_tokens", "Gemma2TextScaledWordEmbedding: its forward is not the plain one"),
        ("Gemma2ForCausalLM", "model.layers.0.input_layernorm", "normalisation"),
        ("MPNetForMaskedLM", "mpnet.encoder.relative_attention_bias", "beside the word table"),
        ("Lfm2ForCausalLM", "model.layers.0.conv.conv", "Conv1d: its weights are not those of a Linear"),
        ("Qwen2ForCausalLM", "lm_head", "head"),
    ],
)
def test_what_cannot_be_replaced_says_why(architecture: str, path: str, said: str, shelf: Any) -> None:
    options: dict[str, Any] = {"word_embed_proj_dim": 16} if "OPT" in architecture else {"num_key_value_heads": 1}
    options |= {"layer_types": ["conv", "full_attention"]} if "Lfm2" in architecture else {}
    options |= {"bos_token_id": 1, "eos_token_id": 2}
    found = job(shelf.make(f"why-{architecture}", architecture, words=None, **options))
    assert found.plan.kept_float[path].startswith(said)
    assert found.plan.modules and path not in found.plan.modules


def test_static_scales_of_a_decoder(zoo: Any, desk: Path, qtool_command: Command) -> None:
    """Every input range was seen, also that of the last block, and the artifact still says what the model says."""
    source = zoo.make("static", "LlamaForCausalLM", bos_token_id=1, eos_token_id=2)
    stored = quantized(qtool_command, source, "-c", "zeroquant-w8a8-static", "--set", "calibration.source=random")
    assert len([name for name in stored if name.endswith("act_scale")]) == 2 * 7
    exact, found = (transformers.LlamaForCausalLM.from_pretrained(folder).eval() for folder in (source, desk / "out"))
    ids = torch.randint(5, 65, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = exact(ids).logits
        assert rms(found(ids).logits - expected) < 0.3 * rms(expected)
