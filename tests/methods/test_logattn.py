"""Attention on codes: planned, calibrated on what exists alone, loaded by plain transformers, generating, refusing."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import ATTENDING, DATA, NOT_ATTENDING, Artifacts, batch, load, outputs, source_of
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

import qtool
from qtool import pipeline
from qtool.api import calibration_batches, open_job, resolve_recipe
from qtool.artifact import quantization_config, write_tensors
from qtool.calibrate.probabilities import Distribution
from qtool.calibrate.statistics import Statistics
from qtool.errors import InputError
from qtool.hf import CODES
from qtool.inspection import inspect
from qtool.nn import CodedAttention
from qtool.nn.codes import CODES_CHILD
from qtool.numerics.codebook import Codebook

BERT = "BertForSequenceClassification"
PAPER = {"mapping": "log", "levels": "midpoint", "relative": "false", "threshold": "0.02", "renormalize": "false"}
SITES = tuple(f"bert.encoder.layer.{layer}.attention.self" for layer in range(2))
Coded = Callable[..., Path]


def options(**values: Any) -> tuple[str, ...]:
    return tuple(f"methods.logattn.{name}={value}" for name, value in values.items())


@pytest.fixture(scope="module")
def artifacts(shelf: Any) -> Artifacts:
    return Artifacts(shelf.folder, "logattn", initializer_range=0.25)


@pytest.fixture
def coded(artifacts: Artifacts) -> Coded:
    """The artifact of a tiny model by its class."""

    def make(architecture: str, *sets: str, methods: tuple[str, ...] = ("logattn",)) -> Path:
        return artifacts.make(architecture, methods, *sets)

    return make


def attending(model: Any) -> dict[str, CodedAttention]:
    return {path: module for path, module in model.named_modules() if isinstance(module, CodedAttention)}


@contextmanager
def eager(model: Any, change: Callable[[Any, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Inside, a float model's probabilities, in float64, are what `change` makes of them."""

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **given: Any) -> Any:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.double().repeat_interleave(groups, 1) for x in (key, value))
        scores = query.double() @ key.mT * given["scaling"] + (0 if mask is None else mask)
        return (change(module, scores.softmax(-1)) @ value).transpose(1, 2).to(query.dtype), None

    AttentionInterface.register("eagerly", attend)
    AttentionMaskInterface.register("eagerly", eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("eagerly")
    yield
    model.set_attn_implementation(before)


@pytest.mark.parametrize("architecture", ATTENDING)
def test_every_block_attends_on_codes_near_float(coded: Coded, architecture: str) -> None:
    """Six bits are near; with padding, causal masks, windows, grouped heads, scaled queries."""
    folder = coded(architecture, *options(bits=6))
    model, plain = load(folder), load(source_of(folder))
    found, wanted = outputs(model, batch()), outputs(plain, batch())
    assert len(attending(model)) == 2 and all(module.calls for module in attending(model).values())
    assert 0 < (found - wanted).norm() < 0.05 * wanted.norm()
    assert model.config._attn_implementation == CODES


@pytest.mark.parametrize("bits", [3, None])
@pytest.mark.parametrize("architecture", [BERT, "LlamaForCausalLM", "GPT2LMHeadModel"])
def test_the_papers_form_is_its_codebook_on_the_float_models_probabilities(
    coded: Coded, architecture: str, bits: int | None
) -> None:
    folder = coded(architecture, *options(**PAPER, bits="null" if bits is None else bits))
    model, plain = load(folder), load(source_of(folder))
    book = None if bits is None else Codebook.log(bits, 0.02)

    def change(module: Any, p: torch.Tensor) -> torch.Tensor:
        return p * (p > 0.02) if book is None else book.values(book.codes(p))

    with eager(plain, change):
        wanted = outputs(plain, batch())
    torch.testing.assert_close(outputs(model, batch()), wanted, rtol=2e-4, atol=2e-4)
    report = json.loads((folder / "qtool.json").read_text())
    assert report["calibration"] is None and "int8" not in report["execution"]["arithmetic"]


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("architecture", [BERT, "LlamaForSequenceClassification"])
def test_padding_and_the_future_are_not_counted(shelf: Any, architecture: str, relative: bool) -> None:
    """Each text of the calibration data again, alone and without padding, by transformers' own attention."""
    name = f"logattn-words-{architecture}"
    llama = {"left": True, "num_key_value_heads": 1}  # padding moves its tokens, and changes nothing
    source = shelf.make(name, architecture) if architecture == BERT else shelf.causal(name, architecture, **llama)
    text = shelf.write("logattn.jsonl", shelf.sentences(9), [0] * 9)
    sets = (f"calibration.source={text}", *options(relative=str(relative).lower()))
    job = open_job(str(source), resolve_recipe(methods=["logattn"], sets=sets))
    batches = calibration_batches(job)
    statistics = calibrated(job, batches)
    model = load(source, attn_implementation="eager")
    seen: list[list[torch.Tensor]] = [[], []]
    for inputs in batches.batches:
        for row, real in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
            with torch.no_grad():
                found = model(input_ids=row[real][None], output_attentions=True).attentions
            for layer, p in enumerate(found):
                future = torch.ones(p.shape[2:]).triu(1).bool() & (architecture != BERT)
                seen[layer].append(p[0].masked_fill(future, -1).transpose(0, 1))
    kind = "attention-shares" if relative else "attention-histogram"
    for layer, unit in enumerate(job.anatomy.blocks):
        site = next(site for site in job.observed()[unit.name] if site.endswith(":probabilities"))
        got = Distribution.from_state(statistics.state(site, kind))
        alone = [Distribution.of(rows, relative=relative) for rows in seen[layer]]
        wanted = sum(alone[1:], alone[0])
        assert got.rows == wanted.rows and got.counts.sum().equal(wanted.counts.sum())
        moved = (got.counts.cumsum(-1) - wanted.counts.cumsum(-1)).abs().sum()  # a last bit may cross an end
        assert moved <= 0.002 * wanted.counts.sum()
        torch.testing.assert_close(got.mass.sum(-1), wanted.mass.sum(-1), rtol=1e-5, atol=0)


def calibrated(job: Any, batches: Any) -> Statistics:
    steps = pipeline.calibrate(job, batches)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            statistics: Statistics = done.value
            return statistics


def test_a_sparsity_is_reached_on_the_calibration_data(coded: Coded) -> None:
    folder = coded(BERT, *options(sparsity=0.6, bits="null"))
    model = load(folder)
    zeros = pairs = 0

    def look(module: CodedAttention, args: Any, result: Any) -> None:
        nonlocal zeros, pairs
        zeros, pairs = zeros + int((result[1] == 0).sum()), pairs + result[1].numel()

    for module in attending(model).values():
        module.register_forward_hook(look)
    job = open_job(str(source_of(folder)), resolve_recipe(methods=["logattn"], sets=(*DATA, *options(sparsity=0.6))))
    for inputs in calibration_batches(job).batches:
        assert inputs["attention_mask"].all()  # random tokens have no padding
        outputs(model, dict(inputs))
    assert zeros / pairs == pytest.approx(0.6, abs=0.05)  # inputs of the second block differ a little
    figures = json.loads((folder / "qtool.json").read_text())["figures"]
    said = [figures[f"{site}.{CODES_CHILD}"] for site in SITES]
    assert sum(one["zeros_percent"] for one in said) / 2 == pytest.approx(60, abs=0.1)
    assert all(one["mean_keys"] == 12 for one in said)


def test_lost_mass_is_a_budget_of_each_head(coded: Coded) -> None:
    folder = coded(BERT, *options(lost_mass=0.1, bits=4, mapping="log", relative="false"))
    figures = json.loads((folder / "qtool.json").read_text())["figures"]
    assert [figures[f"{site}.{CODES_CHILD}"]["lost_mass_percent"] for site in SITES] == pytest.approx(
        [10, 10], abs=0.01
    )
    for module in attending(load(folder)).values():
        assert module.edges.shape == (2, 15) and not module.edges[0].equal(module.edges[1])


def test_statistics_are_reused_and_bytes_do_not_change(coded: Coded, shelf: Any, tmp_path: Path) -> None:
    folder = coded(BERT)
    source = str(source_of(folder))
    recipe = resolve_recipe(methods=["logattn"], sets=DATA, model=source)
    job = open_job(source, recipe)
    batches = calibration_batches(job)
    statistics = calibrated(job, batches)
    write_tensors(tmp_path / "statistics.safetensors", statistics.tensors())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(pipeline, "_check_in_fresh_process", lambda *args: None)
        again = qtool.quantize(
            source, method="logattn", output=tmp_path / "out", set=DATA, statistics=tmp_path / "statistics.safetensors"
        )
    assert (again.path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    seen = Distribution.from_state(statistics.state(f"{SITES[0]}:probabilities", "attention-shares"))
    assert seen.counts.sum(-1).tolist() == [8 * 12 * 12] * 2


def test_zeroquant_lowers_what_logattn_leaves(coded: Coded) -> None:
    for methods in (("zeroquant", "logattn"), ("logattn", "zeroquant")):
        folder = coded(BERT, methods=methods)
        config = quantization_config(folder)
        assert config["methods"] == ["zeroquant", "logattn"]
        kinds = {one["type"] for one in config["modules"].values()}
        assert kinds == {"linear", "embedding", "attention_codes"}
        report = json.loads((folder / "qtool.json").read_text())
        assert not set(report["kept_float"]) & set(config["modules"])
        assert report["execution"]["arithmetic"] == (
            "int8 x int8 -> int32; attention probabilities in codes of 3 bits, float products"
        )
    model = load(folder)
    found, near = outputs(model, batch()), outputs(load(coded(BERT, methods=("zeroquant",))), batch())
    assert all(module.calls for module in attending(model).values())
    assert 0 < (found - near).norm() < 0.3 * near.norm()


@pytest.mark.parametrize("methods", [("logattn",), ("zeroquant", "logattn")])
@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_generation_is_the_same_with_and_without_a_cache(
    coded: Coded, architecture: str, methods: tuple[str, ...]
) -> None:
    model = load(coded(architecture, methods=methods))
    ids, real = torch.randint(5, 65, (3, 9), generator=torch.Generator().manual_seed(1)), torch.ones(3, 9).long()
    ids[1, :4], real[1, :4] = 0, 0
    said = [
        model.generate(
            input_ids=ids, attention_mask=real, max_new_tokens=8, do_sample=False, use_cache=cache,
            eos_token_id=None, pad_token_id=0,
        )
        for cache in (True, False)
    ]  # fmt: skip
    assert said[0].shape == (3, 17) and said[0].equal(said[1])


def test_probabilities_are_given_where_codes_say_them(coded: Coded) -> None:
    inputs = batch()
    found = load(coded(BERT))(**inputs, output_attentions=True).attentions
    exists = inputs["attention_mask"].bool()[:, None, None, :].expand_as(found[0])
    assert len(found) == 2 and not found[0][~exists].any()
    assert found[0].sum(-1).allclose(torch.ones(5, 2, 9))
    with pytest.raises(InputError, match="only pruned cannot give its probabilities"):
        load(coded(BERT, *options(**PAPER, bits="null")))(**inputs, output_attentions=True)


def test_another_attention_and_training_are_refused(coded: Coded) -> None:
    folder = coded(BERT)
    with pytest.raises(InputError, match="attn_implementation='eager' cannot run this model"):
        load(folder, attn_implementation="eager")
    model = load(folder)
    model.set_attn_implementation("sdpa")
    with pytest.raises(InputError, match="attention 'sdpa' was set"):
        outputs(model, batch())
    model.set_attn_implementation(CODES)
    with pytest.raises(InputError, match="no dropout and no gradient"):
        model.train()(**batch())


def test_codebooks_keep_their_types_in_half_precision(coded: Coded) -> None:
    model = load(coded(BERT), dtype=torch.bfloat16)
    with torch.no_grad():
        assert model(**batch()).logits.dtype == torch.bfloat16
    for module in attending(model.to(torch.float16)).values():
        assert (module.edges.dtype, module.levels.dtype) == (torch.float64, torch.float32)


def test_a_rule_keeps_the_attention_of_a_block_float(coded: Coded) -> None:
    model = load(coded(BERT, f"rules={{'*.1.*{CODES_CHILD}': float}}"))
    assert list(attending(model)) == [f"{SITES[0]}.{CODES_CHILD}"]


def test_a_rule_reaches_attention_beside_zeroquant(artifacts: Artifacts) -> None:
    rule = f"rules={{'*.1.*{CODES_CHILD}': float}}"
    recipe = resolve_recipe(methods=["zeroquant", "logattn"], sets=(*DATA, rule))
    job = open_job(str(artifacts.source(BERT)), recipe)
    assert f"{SITES[0]}.{CODES_CHILD}" in job.plan.modules and f"{SITES[1]}.{CODES_CHILD}" not in job.plan.modules


@pytest.mark.parametrize("architecture", NOT_ATTENDING)
def test_an_architecture_outside_the_registry_is_refused_by_name(artifacts: Artifacts, architecture: str) -> None:
    source = artifacts.source(architecture, **NOT_ATTENDING[architecture])
    with pytest.raises(InputError, match=f"{architecture} does not attend through transformers' registry"):
        open_job(str(source), resolve_recipe(methods=["logattn"], sets=DATA))


NONSENSE = [
    (("logattn",), options(threshold=0.1, sparsity=0.5), "threshold and sparsity say the same thing"),
    (("logattn",), options(pruned="false"), "pruned false is the paper's form"),
    (("logattn",), options(bits="null"), "bits null only prunes; say how much"),
    (("logattn",), options(levels="midpoint"), "levels midpoint is for mapping log or linear"),
    (("logattn",), options(bits=9), "bits"),
    (("logattn",), options(threshold=0), "threshold"),
    (("logattn",), options(bit=3), "unknown option 'bit'; did you mean bits"),
    (("logattn",), ("rules={'*.query': float}",), r"rule '\*\.query' matches no module"),
    (
        ("headprune", "logattn"),
        ("methods.headprune.heads={0: [1]}", "rules={'*.query': float}"),
        r"rule '\*\.query' matches no module",
    ),
    (("headprune",), ("methods.headprune.heads={0: [1]}", "rules={'*.query': float}"), "no rule can apply"),
]


@pytest.mark.parametrize(("methods", "sets", "said"), NONSENSE)
def test_what_makes_no_sense_is_refused_by_name(
    methods: tuple[str, ...], sets: tuple[str, ...], said: str, artifacts: Artifacts
) -> None:
    source = artifacts.source(BERT)
    with pytest.raises(InputError, match=said):
        open_job(str(source), resolve_recipe(methods=list(methods), sets=(*DATA, *sets)))


def test_inspect_and_the_card_say_what_the_codes_are(coded: Coded) -> None:
    folder = coded(BERT)
    found = inspect(folder, verify=True)
    assert not found["damage"] and found["methods"] == ["logattn"]
    assert [one["module"] for one in found["attention"]] == [f"{site}.{CODES_CHILD}" for site in SITES]
    assert all(one["mean_keys"] == 12 and 0 < one["zeros_percent"] < 100 for one in found["attention"])
    assert {row["activations"] for row in found["modules"]} == {"3-bit codes"}
    card = (folder / "README.md").read_text("utf-8")
    assert "Weights are float; attention probabilities in codes of 3 bits, float products." in card


def test_a_dry_run_plans_attention_and_nothing_else(shelf: Any, desk: Path, qtool_command: Callable[..., Any]) -> None:
    model = shelf.make("logattn-dry", BERT)
    ended = qtool_command("quantize", model, "--method", "logattn", "--dry-run", "--json", "-")
    assert ended.code == 0, ended.err
    plan = json.loads(ended.out)
    assert set(plan["quantized"]) == {f"{site}.{CODES_CHILD}" for site in SITES}
    assert set(plan["kept_float"].values()) == {"logattn changes no weights"}
    assert plan["calibration"] and not list(desk.iterdir())
