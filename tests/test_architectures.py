"""Every class of every family, and classes nobody listed: quantized, loaded by plain transformers, run, generating."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_models import DATA, GROUPED, SHAPE, TIDY, batch, golden_check_here, load, save
from transformers import AttentionInterface, AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import qtool
from qtool.anatomy import Part, anatomy
from qtool.artifact import damaged_tensors, quantization_config
from qtool.checkpoint import WEIGHTS
from qtool.errors import InputError
from qtool.nn import QLinear, QModule, QTiedLinear

TASKS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
ENCODERS = [f"{family}{head}" for family in ("DistilBert", "Electra") for head in (*TASKS, "ForMaskedLM", "Model")]
ENCODERS += [f"{family}{head}" for family in ("Bert", "Roberta") for head in TASKS[1:]]
DECODERS: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": TIDY,
    "OPTForCausalLM": {**TIDY, "ffn_dim": 48, "init_std": 0.4, "word_embed_proj_dim": 16},
    "GPTNeoXForCausalLM": TIDY,
    "GPTJForCausalLM": {**TIDY, "rotary_dim": 8},
    "LlamaForCausalLM": {**GROUPED, "tie_word_embeddings": True},
    "MistralForCausalLM": {**GROUPED, "sliding_window": 6},
    "Qwen2ForCausalLM": GROUPED,
}
HEADED = {
    "GPT2Model": TIDY,
    "LlamaModel": GROUPED,
    "OPTForSequenceClassification": DECODERS["OPTForCausalLM"],
    **{f"GPT2{task}": TIDY for task in TASKS},
    **{f"GPTNeoX{task}": TIDY for task in TASKS},
    **{f"Llama{task}": GROUPED for task in TASKS},
}
UNLISTED: dict[str, dict[str, Any]] = {
    "FalconForCausalLM": TIDY,
    "GPTBigCodeForCausalLM": TIDY,
    "PhiForCausalLM": TIDY,
    "StableLmForCausalLM": GROUPED,
    "BloomForCausalLM": TIDY,
    "Gemma2ForCausalLM": {**GROUPED, "head_dim": 8, "sliding_window": 12},
    "Gemma3ForCausalLM": {**GROUPED, "head_dim": 8, "sliding_window": 6, "num_hidden_layers": 6},
    "Qwen3ForCausalLM": {**GROUPED, "head_dim": 8},
    "OpenAIGPTLMHeadModel": {},
    "MPNetForMaskedLM": {},
    "ModernBertForMaskedLM": {**TIDY, "cls_token_id": 1, "sep_token_id": 2, "num_hidden_layers": 4},
    "ModernBertForSequenceClassification": {**TIDY, "cls_token_id": 1, "sep_token_id": 2},
    "DebertaV2ForMaskedLM": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
}
ALL = {**{name: {} for name in ENCODERS}, **DECODERS, **HEADED, **UNLISTED}
LANGUAGE = [name for name in ALL if name.endswith(("ForCausalLM", "LMHeadModel"))]
Quantized = Callable[[str], Path]


@pytest.fixture(scope="module")
def quantized(shelf: Any) -> Quantized:
    """The artifact of a tiny model by its class, made once; the float model is beside it."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            folder = float_model(shelf, architecture)
            with golden_check_here(shelf.folder):
                made[architecture] = quantize(folder, folder.with_name(f"arch-{architecture}-int8"))
        return made[architecture]

    return make


def float_model(shelf: Any, architecture: str, **options: Any) -> Path:
    return save(shelf.folder / f"arch-{architecture}", architecture, **{**ALL.get(architecture, {}), **options})


def quantize(folder: Path, out: Path, *sets: str) -> Path:
    return qtool.quantize(str(folder), method="zeroquant", output=out, set=(*DATA, *sets)).path


@torch.no_grad()
def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """All scores of real tokens (or of texts) in a row."""
    found = model(**inputs, use_cache=False) if "Causal" in type(model).__name__ else model(**inputs)
    values = [value for value in found.values() if isinstance(value, torch.Tensor)]
    real = inputs["attention_mask"].bool()
    return torch.cat([(x[real] if x.shape[:2] == real.shape else x).flatten().double() for x in values])


def expanded(folder: Path) -> Any:
    """The stock model in float64 on codes × scales as they lie in the file, with token-wise rounded inputs."""
    tensors, modules = load_file(folder / WEIGHTS), quantization_config(folder)["modules"]
    model = load(folder.with_name(folder.name.removesuffix("-int8"))).double()
    for path, described in modules.items():
        module = model.get_submodule(path)
        if described["type"] == "tied_linear":  # shares the parameter of its table
            assert module.weight is model.get_submodule(described["table"]).weight
            continue
        codes, (rows, columns) = tensors[f"{path}.weight"].double(), described["shape"]
        if described["type"] == "linear":
            codes = codes.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
            module.register_forward_pre_hook(rounded)
        matrix = codes.reshape(codes.shape[0], -1)[:rows, :columns] * tensors[f"{path}.weight_scale"].double()
        module.weight.data = matrix.t().clone() if isinstance(module, Conv1D) else matrix
    return model


def rounded(module: Any, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
    step = args[0].abs().amax(-1, keepdim=True) / 127
    return torch.floor(args[0] / step.clamp_min(1e-30) + 0.5) * step


@pytest.mark.parametrize("architecture", ALL)
def test_quantized_and_loaded(quantized: Quantized, architecture: str) -> None:
    """Outputs are those of the integers in the file, up to float32, and near those of the float model."""
    folder = quantized(architecture)
    model, stock, inputs = load(folder), load(folder.with_name(f"arch-{architecture}")), batch()
    found, wanted, floats = outputs(model, inputs), outputs(expanded(folder), inputs), outputs(stock, inputs)
    lost = (wanted - floats).norm()
    assert (found - wanted).norm() < 0.1 * lost < 0.02 * floats.norm()
    known = anatomy(stock)
    replaced = {path for path, module in model.named_modules() if isinstance(module, QLinear)}
    assert replaced == {part.path for unit in known.blocks for part in unit.parts} != set()
    assert known.generic == (architecture in UNLISTED)


@pytest.mark.parametrize("architecture", LANGUAGE)
def test_generate_with_and_without_cache(quantized: Quantized, architecture: str) -> None:
    """Greedy tokens of prompts padded to the left; the cache changes nothing, and neither does the batch."""
    model, prompts = load(quantized(architecture)), batch(left=True)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cached, uncached = (model.generate(**prompts, **options, use_cache=cache) for cache in (True, False))
    assert cached.shape == (5, 21) and torch.equal(cached, uncached)
    alone = model.generate(input_ids=prompts["input_ids"][:1], **options)
    assert torch.equal(alone[0], cached[0])


REPEATED = ["GPT2LMHeadModel", "OPTForCausalLM", "GPTNeoXForCausalLM", "LlamaForCausalLM", "MistralForCausalLM"]


@pytest.mark.parametrize("architecture", [*REPEATED, "GPT2Model", "Qwen2ForCausalLM", "PhiForCausalLM"])
def test_decoders_attend_in_float64(quantized: Quantized, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every layer, unless another attention was asked for."""
    model, seen = load(quantized(architecture)), []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        seen.append(query.dtype)
        return sdpa(query, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    outputs(model, batch())
    assert seen == [torch.float64] * 2
    eager = type(model).from_pretrained(quantized(architecture), attn_implementation="eager").eval()
    assert eager.config._attn_implementation == "eager"
    assert (outputs(eager, batch()) - outputs(model, batch())).norm() < 0.05 * outputs(model, batch()).norm()


@pytest.mark.parametrize("architecture", REPEATED)
def test_a_step_with_a_cache_repeats_the_whole_text(quantized: Quantized, architecture: str) -> None:
    """Every hidden state of 30 steps, one token at a time, is bit for bit the one of the text at once."""
    model = load(quantized(architecture))
    base, ids = model.base_model, torch.randint(5, 65, (3, 30), generator=torch.Generator().manual_seed(3))
    steps, past = [], None
    with torch.no_grad():
        whole = base(input_ids=ids, use_cache=False).last_hidden_state
        for token in ids.unbind(1):
            step = base(input_ids=token[:, None], past_key_values=past, use_cache=True)
            past = step.past_key_values
            steps.append(step.last_hidden_state)
    found = torch.cat(steps, 1)
    if any(name.endswith("project_in") for name, _ in base.named_modules()):
        # OPT with narrow embeddings: a float product in front, whose sums may depend on how many rows come at once.
        assert (found - whole).norm() < 0.05 * whole.norm()
    else:
        assert (found == whole).double().mean() > 0.999


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "LlamaForCausalLM", "OPTForCausalLM"])
def test_a_tied_head_shares_the_codes(quantized: Quantized, architecture: str) -> None:
    folder = quantized(architecture)
    model, stored = load(folder), load_file(folder / WEIGHTS)
    head = model.get_output_embeddings()
    assert isinstance(head, QTiedLinear) and not any(name.startswith("lm_head") for name in stored)
    assert head.weight is model.get_input_embeddings().weight and head.weight.dtype == torch.int8


@pytest.mark.parametrize("architecture", DECODERS)
def test_saved_and_loaded_again(quantized: Quantized, tmp_path: Path, architecture: str) -> None:
    """Also where transformers knows other names for a float model's tensors (GPT-NeoX)."""
    first = load(quantized(architecture))
    first.save_pretrained(tmp_path / "saved")
    second = load(tmp_path / "saved")
    assert damaged_tensors(tmp_path / "saved") == []
    assert torch.equal(outputs(first, batch()), outputs(second, batch()))


@pytest.mark.parametrize("architecture", DECODERS)
def test_the_bare_model_of_a_causal_artifact(quantized: Quantized, architecture: str) -> None:
    folder = quantized(architecture)
    whole, bare = load(folder), AutoModel.from_pretrained(folder)
    with torch.no_grad():
        hidden = bare(**batch(), use_cache=False).last_hidden_state
        logits = whole(**batch(), use_cache=False).logits
        assert torch.equal(whole.get_output_embeddings()(hidden), logits)
    assert sum(isinstance(module, QModule) for module in bare.modules()) > 8


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_pipeline(zoo: Any, desk: Path, architecture: str) -> None:
    folder = zoo.make(
        "m", architecture, **{key: value for key, value in ALL[architecture].items() if "heads" not in key}
    )
    out = quantize(folder, desk / "out")
    model, tokenizer = load(out), transformers.AutoTokenizer.from_pretrained(out)
    said = transformers.pipeline("text-generation", str(out))("w1 w2 w3", max_new_tokens=5, do_sample=False)
    ids = tokenizer("w1 w2 w3", return_tensors="pt").input_ids
    wanted = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    decoded = tokenizer.decode(wanted[0], skip_special_tokens=True)
    assert said[0]["generated_text"].replace(" ", "") == decoded.replace(
        " ", ""
    )  # the pipeline joins two decoded pieces


# What the parts of a fused matrix say


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "GPTNeoXForCausalLM", "LlamaForCausalLM"])
def test_rows_of_parts_are_what_attention_receives(architecture: str, shelf: Any) -> None:
    """At position 0 rotary embeddings turn nothing, so that one token shows query and key as the matrices give them."""
    received: list[tuple[torch.Tensor, ...]] = []

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        received.append((query, key, value))
        return query.transpose(1, 2), None

    AttentionInterface.register("received", attention)
    cls = getattr(transformers, architecture)
    options = dict(ALL[architecture])
    model = cls(cls.config_class(**{**SHAPE, "num_attention_heads": 4, **options})).eval().double()
    model.set_attn_implementation("received")
    entered: dict[str, torch.Tensor] = {}
    blocks = anatomy(model).blocks
    for unit in blocks:
        for part in unit.parts:
            model.get_submodule(part.path).register_forward_pre_hook(
                lambda module, args, path=part.path: entered.update({path: args[0]})
            )
    with torch.no_grad():
        model(input_ids=torch.tensor([[7], [9]]))
    assert len(received) == len(blocks) == 2
    for unit, states in zip(blocks, received, strict=True):
        for name, state in zip(("query", "key", "value"), states, strict=True):
            part = next(part for part in unit.parts if part.name == f"attention.{name}")
            wanted = computed(model.get_submodule(part.path), part, entered[part.path][:, 0])
            assert torch.allclose(state.transpose(1, 2).flatten(1), wanted, atol=1e-12), part


@torch.no_grad()
def computed(module: Any, part: Part, x: torch.Tensor) -> torch.Tensor:
    weight = module.weight.t() if part.transposed else module.weight
    bias = torch.zeros(len(weight), dtype=x.dtype) if module.bias is None else module.bias
    rows = torch.cat([torch.arange(len(weight))[stretch] for stretch in part.rows or (slice(None),)])
    return x @ weight[rows].t() + bias[rows]


# What is refused, in one line


REFUSED = {
    "MixtralForCausalLM": (GROUPED, "in pieces that transformers joins while loading; such models (mixtral) are not"),
    "AlbertForMaskedLM": ({}, "AlbertForMaskedLM makes 2 layers of 1 blocks; models that run a block more than once"),
    "T5ForConditionalGeneration": ({}, "T5ForConditionalGeneration is not supported; heads that are"),
    "T5EncoderModel": ({}, "T5EncoderModel shares its word table with encoder.embed_tokens"),
    "BartForSequenceClassification": ({}, "BartForSequenceClassification is an encoder-decoder (bart)"),
    "BertLMHeadModel": ({"is_decoder": True}, "bert used as a decoder is not supported"),
    "GPT2DoubleHeadsModel": (TIDY, "GPT2DoubleHeadsModel is not supported; heads that are"),
    "GPT2ForSequenceClassification": ({**TIDY, "pad_token_id": None}, "set pad_token_id in config.json"),
    "ViTModel": ({"image_size": 32}, "needs a list of blocks with a word table before it"),
    "MobileBertForMaskedLM": ({"embedding_size": 32, "intra_bottleneck_size": 16}, "cannot be run unit by unit"),
    "SqueezeBertForMaskedLM": ({"embedding_size": 32}, "SqueezeBertForMaskedLM does not run block after block"),
}


@pytest.mark.filterwarnings(
    "ignore:Initializing zero-element tensors:UserWarning", "ignore:Using a non-tuple:UserWarning"
)
@pytest.mark.parametrize("architecture", REFUSED)
def test_refused_in_one_line(zoo: Any, desk: Path, architecture: str) -> None:
    options, said = REFUSED[architecture]
    cls = getattr(transformers, architecture)
    cls(cls.config_class(**{**SHAPE, **options})).save_pretrained(zoo.folder / "m")
    with pytest.raises(InputError) as error:
        quantize(zoo.folder / "m", desk / "out")
    assert said in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_generic_anatomy_is_said(zoo: Any, desk: Path, qtool_command: Any) -> None:
    folder = float_model(zoo, "PhiForCausalLM")
    ended = qtool_command("quantize", folder, "--method", "zeroquant", "--set", "calibration.source=random", "-o", "o")
    assert ended.code == 0, ended.err
    assert "model type 'phi' is not in qtool's table: its generic anatomy is used" in ended.err


# A real model


@pytest.fixture(scope="module")
def gpt2(test_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, folder = test_models("tiny-gpt2-wikitext"), tmp_path_factory.mktemp("gpt2")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return quantize(source, folder / "int8")


PROMPTS = ["The game was", "In 1990 , the", "She", "The first season of the series was produced by", "A large part of"]


@pytest.mark.slow
def test_a_real_gpt2_generates_the_same_with_and_without_cache(gpt2: Path, test_models: Any) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(gpt2).eval()
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    inputs = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    cached, uncached = (model.generate(**inputs, **options, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, uncached)
    stock = AutoModelForCausalLM.from_pretrained(test_models("tiny-gpt2-wikitext")).eval().generate(**inputs, **options)
    assert (cached == stock).double().mean() > 0.6


@pytest.mark.slow
def test_a_real_gpt2_keeps_its_perplexity(gpt2: Path, test_models: Any, shared_data: Any) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2)
    text = (shared_data("wikitext-2") / "test.txt").read_text("utf-8")[:60_000]
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    windows = ids[: len(ids) // 256 * 256].view(-1, 256)
    losses = []
    for folder in (test_models("tiny-gpt2-wikitext"), gpt2):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            losses.append(sum(model(input_ids=x[None], labels=x[None]).loss.item() for x in windows) / len(windows))
    assert abs(losses[1] - losses[0]) < 0.003
