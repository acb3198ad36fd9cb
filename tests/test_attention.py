"""Models with INT8 products in attention: planned, calibrated, loaded by plain transformers, generating, refusing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import ATTENDING, DATA, DECODERS, GROUPED, NOT_ATTENDING, Artifacts, batch, load, outputs, source_of
from transformers import AttentionInterface, AutoModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from qtool import kernels
from qtool.api import calibration_batches, open_job, resolve_recipe
from qtool.artifact import quantization_config
from qtool.errors import InputError
from qtool.hf import CODES
from qtool.nn import QAttention, QCodedAttention
from qtool.nn.attention import CHILD
from qtool.nn.plan import one_by_one
from qtool.numerics.codebook import Codebook

INTEGER = "methods.zeroquant.attention=int8"
Quantized = Callable[..., Path]


@pytest.fixture(scope="module")
def artifacts(shelf: Any) -> Artifacts:
    return Artifacts(shelf.folder, "attention")


@pytest.fixture
def quantized(artifacts: Artifacts) -> Quantized:
    """The artifact of a tiny model by its class; `attention` is how it attends."""

    def make(architecture: str, *sets: str, attention: str = INTEGER) -> Path:
        return artifacts.make(architecture, ("zeroquant",), *((attention,) if attention else ()), *sets)

    return make


def products(model: Any) -> dict[str, QAttention]:
    return {path: module for path, module in model.named_modules() if isinstance(module, QAttention)}


@pytest.mark.parametrize("architecture", ATTENDING)
def test_every_block_attends_on_codes_near_float(quantized: Quantized, architecture: str) -> None:
    """Next to the same integers with float attention, with padding and, for a decoder, its causal mask and window."""
    model, near = load(quantized(architecture)), load(quantized(architecture, attention=""))
    inputs = batch()
    found, wanted = outputs(model, inputs), outputs(near, inputs)
    assert len(products(model)) == 2 and all(module.calls for module in products(model).values())
    assert 0 < (found - wanted).norm() < 0.12 * wanted.norm()  # random weights make scores of tens
    assert model.config._attn_implementation == CODES


@pytest.mark.parametrize("architecture", ATTENDING)
def test_value_scales_are_those_of_the_values_that_attention_gets(
    quantized: Quantized, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where values are a part of a fused matrix, side by side or head by head, and where heads are grouped."""
    folder = quantized(architecture)
    source = source_of(folder)
    job = open_job(str(source), resolve_recipe(methods=["zeroquant"], sets=(*DATA, INTEGER)))
    peaks: dict[str, torch.Tensor] = {}
    model = load(source)
    names = {module: name for name, module in model.named_modules()}

    def look(module: Any, query: Any, key: Any, value: torch.Tensor, mask: torch.Tensor, **options: Any) -> Any:
        real = inputs["attention_mask"].bool()
        largest = value.transpose(1, 2)[real].abs().amax((0, 2))  # [heads]
        peaks[names[module]] = torch.maximum(peaks.get(names[module], largest), largest)
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        weights = (query @ key.transpose(2, 3) * options["scaling"] + (0 if mask is None else mask)).softmax(-1)
        return (weights @ value).transpose(1, 2), None

    AttentionInterface.register("look", look)
    AttentionMaskInterface.register("look", eager_mask)
    model.set_attn_implementation("look")
    for inputs in calibration_batches(job).batches:
        outputs(model, inputs)
    for path, module in products(load(folder)).items():
        wanted = peaks[path.removesuffix(f".{CHILD}")] / 127
        assert module.value_scale.shape == (module.groups,)
        torch.testing.assert_close(module.value_scale, wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("architecture", DECODERS)
def test_a_step_with_a_cache_repeats_codes_and_numbers(quantized: Quantized, architecture: str) -> None:
    """The codes of probabilities and every hidden state of 20 steps, `==` those of the text at once."""
    model = load(quantized(architecture))
    codes: list[torch.Tensor] = []
    for module in products(model).values():
        module.register_forward_hook(lambda _, __, out: codes.append(out[1]))
    base, ids = model.base_model, torch.randint(5, 65, (3, 20), generator=torch.Generator().manual_seed(3))
    past = None
    with torch.no_grad():
        whole = base(input_ids=ids, use_cache=False).last_hidden_state
        at_once, codes[:] = list(codes), []
        for n, token in enumerate(ids.unbind(1)):
            step = base(input_ids=token[:, None], past_key_values=past, use_cache=True)
            past = step.past_key_values
            assert torch.equal(step.last_hidden_state[:, 0], whole[:, n])
            for layer, alone in enumerate(codes):
                keys = alone.shape[-1]
                assert torch.equal(alone[:, :, 0], at_once[layer][:, :, n, n + 1 - keys : n + 1])
            codes.clear()


@pytest.mark.parametrize("architecture", DECODERS)
def test_generate_with_and_without_cache(quantized: Quantized, architecture: str) -> None:
    """Greedy tokens of prompts padded to the left; the cache changes nothing, and neither does the batch."""
    model, prompts = load(quantized(architecture)), batch(left=True)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached, uncached = (model.generate(**prompts, **options, use_cache=cache) for cache in (True, False))
    assert cached.shape == (5, 17) and torch.equal(cached, uncached)
    alone = model.generate(input_ids=prompts["input_ids"][:1], **options)
    assert torch.equal(alone[0], cached[0])


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "LlamaForCausalLM"])
def test_neighbours_and_padding_change_no_code(quantized: Quantized, architecture: str) -> None:
    model, inputs = load(quantized(architecture)), batch()
    codes: list[torch.Tensor] = []
    for module in products(model).values():
        module.register_forward_hook(lambda _, __, out: codes.append(out[1]))
    outputs(model, inputs)
    together, codes[:] = list(codes), []
    for row, length in enumerate((9, 5, 1, 7, 3)):
        outputs(model, {name: value[row : row + 1, :length] for name, value in inputs.items()})
        for all_codes, own in zip(together, codes, strict=True):
            assert torch.equal(all_codes[row, :, :length, :length], own[0])
            assert not all_codes[row, :, :length, length:].any()
        codes.clear()


def test_masks_of_four_dimensions_and_attentions_are_honoured(quantized: Quantized) -> None:
    model, inputs = load(quantized("BertForSequenceClassification")), batch()
    seen = inputs["attention_mask"].bool()[:, None, None].expand(-1, 1, 9, 9)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        wanted = model(**inputs).logits
        for mask in (seen, added):
            assert torch.equal(model(input_ids=inputs["input_ids"], attention_mask=mask).logits, wanted)
        narrow = seen & (torch.arange(9) <= torch.arange(9)[:, None])
        assert not torch.equal(model(input_ids=inputs["input_ids"], attention_mask=narrow).logits, wanted)
        shown = model(**inputs, output_attentions=True)
    assert torch.equal(shown.logits, wanted) and len(shown.attentions) == 2
    for probabilities in shown.attentions:
        assert probabilities.shape == (5, 2, 9, 9)
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(5, 2, 9))
        assert not probabilities[(~seen).expand(-1, 2, -1, -1)].any()


def test_joined_kernels_step_back(quantized: Quantized) -> None:
    """They attend in float: a model with quantized attention runs module by module on every backend."""
    model = load(quantized("BertForSequenceClassification"))
    found = outputs(model, batch())
    with one_by_one():
        assert torch.equal(outputs(model, batch()), found)
    before = {path: module.calls for path, module in products(model).items()}
    with kernels.using("reference"):
        assert (outputs(model, batch()) - found).norm() < 1e-3 * found.norm()
    assert all(module.calls == before[path] + 1 for path, module in products(model).items())


def test_saved_again_and_taken_out_of_its_head(quantized: Quantized, tmp_path: Path) -> None:
    folder = quantized("BertForSequenceClassification")
    model, inputs = load(folder), batch()
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(load(tmp_path / "again"), inputs), outputs(model, inputs))
    bare = AutoModel.from_pretrained(folder).eval()
    bare.save_pretrained(tmp_path / "bare")
    other = AutoModel.from_pretrained(tmp_path / "bare").eval()
    assert len(products(other)) == 2 and f"encoder.layer.0.attention.self.{CHILD}" in products(other)
    with torch.no_grad():
        wanted = model.bert(**inputs).last_hidden_state
        assert torch.equal(bare(**inputs).last_hidden_state, wanted)
        assert torch.equal(other(**inputs).last_hidden_state, wanted)


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "LlamaForCausalLM"])
def test_products_in_codes_of_a_codebook(quantized: Quantized, architecture: str, tmp_path: Path) -> None:
    """Put in by hand: near the products without, saved and loaded; attentions are levels; the cache changes nothing."""
    model, inputs = load(quantized(architecture)), batch()
    plain = outputs(model, inputs)
    for path, old in products(model).items():
        words = {"code_bits": 4, "relative": True, "renormalize": True, "tokens": 40}
        module = QCodedAttention(old.heads, old.groups, old.size, **words)
        module.value_scale = old.value_scale
        module.fill(Codebook.log(4, 1e-3))
        model.set_submodule(path, module)
    found = outputs(model, inputs)
    assert 0 < (found - plain).norm() < 0.2 * plain.norm()
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(outputs(again, inputs), found)
    path, kept = next(iter(products(again).items()))
    assert isinstance(kept, QCodedAttention) and kept.levels is not None
    assert quantization_config(tmp_path)["modules"][path]["type"] == "coded_attention"
    assert quantization_config(tmp_path)["tensors"][f"{path}.levels"][:2] == ["I32", [kept.heads, 16]]
    with pytest.raises(InputError, match="attn_implementation='eager' cannot run this model"):
        load(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        shown = again(**inputs, output_attentions=True).attentions
        seen = inputs["attention_mask"].bool()[:, None, None]
        assert len(shown) == 2
        for rows in shown:
            assert len(rows[0, 0, 0].unique()) <= 16 and not rows[(~seen).expand_as(rows)].any()
            torch.testing.assert_close(rows[0].sum(-1), torch.ones(rows.shape[1:3]))
        if again.can_generate():
            options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
            prompts = batch(left=True)
            cached, uncached = (again.generate(**prompts, **options, use_cache=cache) for cache in (True, False))
            assert torch.equal(cached, uncached)


def test_the_manifest_covers_the_scales(quantized: Quantized) -> None:
    config = quantization_config(quantized("LlamaForCausalLM"))
    path = f"model.layers.1.self_attn.{CHILD}"
    assert config["modules"][path] == {
        "type": "attention", "heads": 4, "groups": 2, "size": 8, "activations": "int8:token:sym",
    }  # fmt: skip
    assert config["tensors"][f"{path}.value_scale"][:2] == ["F32", [2]]


def test_half_precision_leaves_the_scales(quantized: Quantized) -> None:
    model = load(quantized("BertForSequenceClassification"), dtype=torch.bfloat16)
    with torch.no_grad():
        assert model(**batch()).logits.dtype == torch.bfloat16
    assert all(module.value_scale.dtype == torch.float32 for module in products(model).values())


def test_a_rule_keeps_the_attention_of_a_block_float(quantized: Quantized) -> None:
    for architecture in ("BertForSequenceClassification", "GPT2LMHeadModel"):
        model = load(quantized(architecture, f"rules={{'*.1.*{CHILD}': float}}"))
        assert [path.split(".")[-4 if "Bert" in architecture else -3] for path in products(model)] == ["0"]
        wanted = outputs(load(quantized(architecture, attention="")), batch())
        assert (outputs(model, batch()) - wanted).norm() < 0.12 * wanted.norm()


def test_another_attention_is_refused(quantized: Quantized) -> None:
    folder = quantized("BertForSequenceClassification")
    with pytest.raises(InputError, match="attn_implementation='eager' cannot run this model"):
        load(folder, attn_implementation="eager")
    model = load(folder)
    model.set_attn_implementation("sdpa")
    with pytest.raises(InputError, match="attention 'sdpa' was set"):
        outputs(model, batch())
    model.set_attn_implementation(CODES)
    outputs(model, batch())


def test_what_would_change_the_result_is_refused(quantized: Quantized) -> None:
    model = load(quantized("BertForSequenceClassification"))
    with pytest.raises(InputError, match=r"BertSelfAttention passes head_mask, which qtool.s attention does not know"):
        model(**batch(), head_mask=torch.ones(2, 2))
    model.train()
    with pytest.raises(InputError, match="no dropout and no gradient"):
        model(**batch())


@pytest.mark.parametrize("architecture", NOT_ATTENDING)
def test_an_architecture_outside_the_registry_is_refused_by_name(artifacts: Artifacts, architecture: str) -> None:
    source = artifacts.source(architecture, **NOT_ATTENDING[architecture])
    with pytest.raises(InputError, match=f"{architecture} does not attend through transformers' registry"):
        open_job(str(source), resolve_recipe(methods=["zeroquant"], sets=(*DATA, INTEGER)))


def test_values_that_are_not_known_are_refused(artifacts: Artifacts) -> None:
    source = artifacts.source("Qwen3ForCausalLM", **{**GROUPED, "head_dim": 8})
    with pytest.raises(InputError, match=r"Qwen3ForCausalLM: block\.0 has no attention whose values are known"):
        open_job(str(source), resolve_recipe(methods=["zeroquant"], sets=(*DATA, INTEGER)))
