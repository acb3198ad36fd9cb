"""ZeroQuant's other forms: asymmetric weights, a shorter last group, float activations, an INT8 head, another scale."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import qtool  # noqa: F401 (teaches transformers to read artifacts)
from qtool.api import open_job, resolve_recipe
from qtool.errors import InputError

LLAMA = {"num_attention_heads": 4, "num_key_value_heads": 2}
IDS = torch.randint(4, 40, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def llama(shelf: Any) -> Path:
    """Hidden 32, intermediate 48, two blocks; its head has a matrix of its own."""
    folder: Path = shelf.causal("weights-llama", "LlamaForCausalLM", tie_word_embeddings=False, **LLAMA)
    return folder


def quantized(command: Callable[..., Any], model: Path, *pairs: str) -> tuple[Any, dict[str, torch.Tensor]]:
    sets = [part for pair in pairs for part in ("--set", pair)]
    ended = command("quantize", model, "--method", "zeroquant", "-o", "out", *sets)
    assert ended.code == 0, ended.err
    loaded = transformers.AutoModelForCausalLM.from_pretrained("out").eval()
    return loaded, dict(load_file("out/model.safetensors"))


def values(stored: dict[str, torch.Tensor], path: str, shape: tuple[int, int], width: int) -> torch.Tensor:
    """What a stored matrix stands for, in float64: codes, zero points or offsets, and scales of `width` columns."""
    codes = stored[f"{path}.weight"].double()
    if stored[f"{path}.weight"].dtype == torch.uint8:
        nibbles = torch.stack([codes % 16, codes.div(16).floor()], -1).flatten(-2)
        codes = torch.where(nibbles > 7, nibbles - 16, nibbles)
    codes = codes.transpose(1, 2).flatten(2).flatten(0, 1) if codes.dim() == 4 else codes.squeeze(1)
    codes = codes[: shape[0], : shape[1]]

    def spread(name: str) -> torch.Tensor:
        blocks = stored[f"{path}.{name}"].double()
        return blocks.repeat_interleave(shape[0] // len(blocks), 0).repeat_interleave(width, 1)[:, : shape[1]]

    if f"{path}.weight_zero_point" in stored:
        codes = codes - spread("weight_zero_point")
    found = codes * spread("weight_scale")
    return found + spread("weight_offset") if f"{path}.weight_offset" in stored else found


def rounded_input(module: Any, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
    scale = args[0].abs().amax(-1, keepdim=True) / 127
    return torch.floor(args[0] / scale + 0.5) * scale


def emulated(model: Path, stored: dict[str, torch.Tensor], width: int, *, rounds: bool) -> torch.Tensor:
    """Logits in float64 of the float model with the stored matrices written out."""
    network = transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").double().eval()
    for path in {name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")}:
        module = network.get_submodule(path)
        shape = tuple(module.weight.shape)
        whole = isinstance(module, torch.nn.Embedding) or path == "lm_head"
        module.weight.data = values(stored, path, shape, shape[1] if whole else width)
        if rounds and path.startswith("model.layers"):
            module.register_forward_pre_hook(rounded_input)
    with torch.no_grad():
        found: torch.Tensor = network(IDS).logits
    return found


@pytest.mark.parametrize(
    ("weights", "width"),
    [
        ("int4:channel:asym", 48), ("int8:channel:min", 48), ("int4:group:20:sym", 20), ("int4:group:20:min", 20),
        ("int3:group:16:asym", 16), ("int4:group:128:min", 128), ("int8:group:7:asym", 7),
    ],
)  # fmt: skip
@pytest.mark.parametrize("activations", ["float", "int8:token:sym"])
def test_logits_are_those_of_the_stored_matrices(
    weights: str, width: int, activations: str, llama: Path, desk: Path, qtool_command: Callable[..., Any]
) -> None:
    model, stored = quantized(qtool_command, llama, f"weights={weights}", f"activations={activations}")
    wanted = emulated(llama, stored, width, rounds=activations != "float")
    with torch.no_grad():
        found = model(IDS).logits.double()
    # Roundings of activations that lie on a tie may differ by a step between float32 and float64.
    limit = 1e-4 if activations == "float" else 0.03
    assert (found - wanted).abs().max() <= limit * wanted.abs().max()
    names = {name.rpartition(".")[2] for name in stored if "layers.0.mlp.up_proj" in name}
    second = {"sym": set(), "asym": {"weight_zero_point"}, "min": {"weight_offset"}}[weights.rpartition(":")[2]]
    assert names == {"weight", "weight_scale", *second}


def test_generation_with_and_without_cache_says_the_same(
    llama: Path, desk: Path, qtool_command: Callable[..., Any]
) -> None:
    ended = qtool_command("quantize", llama, "-c", "zeroquant-w4a16", "-o", "out")
    assert ended.code == 0, ended.err
    model = transformers.AutoModelForCausalLM.from_pretrained("out").eval()
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    texts = [
        model.generate(IDS, attention_mask=torch.ones_like(IDS), use_cache=cache, **options) for cache in (True, False)
    ]
    assert texts[0].tolist() == texts[1].tolist()
    card = Path("out/README.md").read_text("utf-8")
    assert "Products are float32 × integer codes → float32" in card


def test_a_rule_keeps_some_activations_in_float(llama: Path, desk: Path, qtool_command: Callable[..., Any]) -> None:
    model, _ = quantized(qtool_command, llama, "rules={'part:ffn.down': {activations: float}}")
    block = model.model.layers[0]
    assert (block.mlp.down_proj.activations, str(block.mlp.up_proj.activations)) == ("float", "int8:token:sym")


@pytest.mark.parametrize("activations", ["float", "int8:token:sym"])
def test_an_int8_head(activations: str, llama: Path, desk: Path, qtool_command: Callable[..., Any]) -> None:
    pairs = ("activations=float", "methods.zeroquant.head=int8:channel:sym")
    model, stored = quantized(qtool_command, llama, *pairs, f"methods.zeroquant.head_activations={activations}")
    assert stored["lm_head.weight"].dtype == torch.int8
    wanted = emulated(llama, stored, 48, rounds=False)
    with torch.no_grad():
        error = (model(IDS).logits.double() - wanted).abs().max() / wanted.abs().max()
    assert error <= 1e-4 if activations == "float" else 1e-5 < error <= 0.03


def test_the_published_scale_rule(llama: Path, desk: Path, qtool_command: Callable[..., Any]) -> None:
    _, stored = quantized(qtool_command, llama, "weights={spec: int4:channel:sym, scale_rule: zeroquant}")
    matrix = transformers.AutoModelForCausalLM.from_pretrained(llama).model.layers[1].mlp.up_proj.weight
    scale = stored["model.layers.1.mlp.up_proj.weight_scale"]
    assert torch.equal(scale, matrix.detach().abs().amax(1, keepdim=True) / 8)


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("activations=flaot", "activations: cannot read 'flaot' as a quantization spec; .*; did you mean float"),
        ("activations={spec: float, num_bits: 8}", "float has no num_bits; write float alone, or a spec"),
        ("weights=float", "cannot read 'float' as a quantization spec"),
        ("methods.zeroquant.head_activations=int8:token:sym", "head_activations: the head itself is float"),
        ("methods.zeroquant.head=int16:channel:sym", "lm_head: weights int16:channel:sym cannot run"),
    ],
)
def test_refusals(pair: str, said: str, llama: Path) -> None:
    with pytest.raises(InputError, match=said):
        open_job(str(llama), resolve_recipe(methods=["zeroquant"], sets=[pair]))


def test_a_tied_head_has_no_codes_of_its_own(shelf: Any) -> None:
    tied = shelf.causal("tied-llama", "LlamaForCausalLM", tie_word_embeddings=True, **LLAMA)
    recipe = resolve_recipe(methods=["zeroquant"], sets=["methods.zeroquant.head=int8:channel:sym"])
    with pytest.raises(InputError, match="head: lm_head shares the word table"):
        open_job(str(tied), recipe)
