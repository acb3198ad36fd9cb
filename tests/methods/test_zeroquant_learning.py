"""ZeroQuant with data: rounding that looks at inputs, distillation, and ranges that migrate into weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from qtool import job, pipeline
from qtool.api import calibration_batches, open_job, quantize_events, resolve_recipe
from qtool.errors import InputError
from qtool.stream import Stream

Command = Callable[..., Any]

LKD = "methods.zeroquant.lkd={steps: 30, learning_rate: 0.05}"
WAYS = {
    "gptq": ("weights.rounding=gptq",),
    "gpfq": ("weights.rounding=gpfq",),
    "weighed": ("weights.rounding=gptq", "methods.zeroquant.token_weights=sensitivity"),
    "lkd": (LKD,),
    "gptq and lkd": ("weights.rounding=gptq", LKD, "methods.zeroquant.lkd.inputs=student"),
    "smoothing": ("methods.zeroquant.smoothing=0.5",),
    "tuned smoothing, gptq and lkd": (
        "methods.zeroquant.smoothing=0.5", "methods.zeroquant.tuning=20", "weights.rounding=gptq", LKD),
}  # fmt: skip


def recipe_of(tiny: Any, *sets: str) -> Any:
    return resolve_recipe(
        config="zeroquant-w8a8",
        sets=("weights=int4:group:16:sym", *sets),
        model=str(tiny.model),
        flags={"task": "sst2", "data": str(tiny.data), "batch_size": 8},
    )


def run(tiny: Any, out: str, *sets: str, resume: bool = False) -> list[Any]:
    return list(quantize_events(str(tiny.model), recipe_of(tiny, *sets), Path(out), resume=resume))


def deciding(out: str) -> list[bytes]:
    return [(Path(out) / name).read_bytes() for name in ("model.safetensors", "config.json")]


@pytest.mark.parametrize("way", WAYS)
def test_twice_the_same_and_something_else_than_plain(way: str, tiny: Any, desk: Path) -> None:
    """Codes change, their shapes do not, and the golden check of the loaded model holds."""
    run(tiny, "plain")
    for out in ("one", "two"):
        run(tiny, out, *WAYS[way])
    assert deciding("one") == deciding("two")
    plain, found = (load_file(Path(out) / "model.safetensors") for out in ("plain", "one"))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in plain.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in found.items()
    }
    path = "bert.encoder.layer.1.attention.output.dense.weight"
    assert not torch.equal(plain[path], found[path])
    assert json.loads(Path("one/qtool.json").read_text())["calibration"] == "60 of the training split of sst2"


@pytest.mark.parametrize("stopped", [1, 2])
@pytest.mark.parametrize("way", ["lkd", "gptq and lkd", "tuned smoothing, gptq and lkd"])
def test_interrupted_and_resumed_is_the_same(
    way: str, stopped: int, tiny: Any, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of a block's distillation, after the first steps were made."""
    from qtool import distill

    run(tiny, "whole", *WAYS[way])
    real, blocks = distill._train, list[int]()

    def interrupted(*arguments: Any) -> int:
        steps = real(*arguments)
        blocks.append(steps)
        if len(blocks) == stopped:
            raise KeyboardInterrupt
        return steps

    with monkeypatch.context() as patch:
        patch.setattr(distill, "_train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tiny, "parts", *WAYS[way])
    assert not Path("parts").exists()
    torch.manual_seed(999)  # what was drawn before has no say
    events = run(tiny, "parts", *WAYS[way], resume=True)
    assert deciding("whole") == deciding("parts")
    said = [event.message for event in events if isinstance(event, job.Note) and "LKD" in event.message]
    assert [one.partition(":")[0] for one in said] == ["block.0", "block.1"][stopped - 1 :]


def test_losses_are_reported(tiny: Any, desk: Path, qtool_command: Command) -> None:
    events = run(tiny, "out", LKD)
    shown = json.loads(qtool_command("inspect", "out", "--json", "-").out)["distilled"]
    assert [one["block"] for one in shown] == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    assert "Distilled blocks" in qtool_command("inspect", "out").out
    figures = json.loads(Path("out/qtool.json").read_text())["figures"]
    for index in range(2):
        found = figures[f"bert.encoder.layer.{index}"]
        assert 0 < found["lkd_after"] < found["lkd_before"]
        assert (shown[index]["loss_before"], shown[index]["loss_after"]) == (found["lkd_before"], found["lkd_after"])
    said = [event.message for event in events if isinstance(event, job.Note)]
    assert any(one.startswith("block.1: LKD loss ") and one.endswith(" in 30 steps") for one in said)


def test_better_answers(tiny: Any, desk: Path, zoo: Any) -> None:
    """Each way leaves logits closer to float's than plain rounding, on texts that taught nothing."""
    texts = zoo.sentences(60, seed=77)
    exact = zoo.plain(tiny.model, texts)
    error: dict[str, float] = {}
    ways = {"plain": (), "gptq": WAYS["gptq"], "gpfq": WAYS["gpfq"]}
    ways["lkd"] = ("methods.zeroquant.lkd={steps: 150, learning_rate: 0.05}",)
    for way, sets in ways.items():
        run(tiny, way, *sets)
        error[way] = float((zoo.plain(Path(way), texts) - exact).square().mean())
    assert error["gptq"] < 0.7 * error["plain"]
    assert error["gpfq"] < 0.8 * error["plain"]
    assert error["lkd"] < 0.7 * error["plain"]


def test_tokens_count_where_they_are_weighed(tiny: Any, desk: Path) -> None:
    """The same rounding gives other codes; one that looks at no data gives the same."""
    weighed = "methods.zeroquant.token_weights=sensitivity"
    for out, ways in {"even": ("weights.rounding=gptq",), "weighed": ("weights.rounding=gptq", weighed)}.items():
        run(tiny, out, *ways)
    for out, ways in {"mse": ("weights.rounding=mse",), "mse, weighed": ("weights.rounding=mse", weighed)}.items():
        run(tiny, out, *ways)
    assert deciding("even")[0] != deciding("weighed")[0]
    assert deciding("mse")[0] == deciding("mse, weighed")[0]


@pytest.mark.parametrize("train", ["both", "scales"])
def test_matrices_that_a_rule_keeps_do_not_learn(train: str, tiny: Any, desk: Path) -> None:
    """A block all in float is not taught at all; in the other one, vectors learn and the kept matrix does not."""
    rules = "rules={'*.layer.1.*': float, '*.layer.0.output.dense': float}"
    run(tiny, "out", LKD, f"methods.zeroquant.lkd.train={train}", rules)
    floats, found = (load_file(folder / "model.safetensors") for folder in (tiny.model, Path("out")))
    layer = "bert.encoder.layer."
    for name, tensor in floats.items():
        if name.startswith(f"{layer}1.") or name == f"{layer}0.output.dense.weight":
            assert torch.equal(found[name], tensor), name
    norm = f"{layer}0.output.LayerNorm.weight"
    assert torch.equal(found[norm], floats[norm]) == (train == "scales")
    assert list(json.loads(Path("out/qtool.json").read_text())["figures"]).count(f"{layer}1") == 0


@pytest.mark.parametrize(
    ("way", "passes"), [("gptq", 2 + 4), ("weighed", 2 + 4 + 3), ("lkd", 1 + 30 * (3 + 2 / 25) / 8), ("smoothing", 0)]
)
def test_a_rehearsal_counts_what_learning_takes(
    way: str, passes: float, tiny: Any, desk: Path, qtool_command: Command
) -> None:
    """Of 8 batches: on to the next block, GPTQ's four stages and gradients, LKD's 30 steps with their looks. Nothing is
    written."""
    assert open_job(str(tiny.model), recipe_of(tiny, *WAYS[way])).method.passes(8) == pytest.approx(passes)
    options = [part for one in ("weights=int4:group:16:sym", *WAYS[way]) for part in ("--set", one)]
    task = ("--task", "sst2", "--data", str(tiny.data))
    ended = qtool_command("quantize", tiny.model, "-c", "zeroquant-w8a8", *options, *task, "--dry-run", "--json", "-")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["seconds"] > 0
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("architecture", "sets"),
    [("BertForSequenceClassification", ["methods.zeroquant.attention=int8"]), ("MPNetForSequenceClassification", [])],
)
def test_smoothing_of_nothing_is_refused(architecture: str, sets: list[str], zoo: Any) -> None:
    model = zoo.make("model", architecture)
    recipe = resolve_recipe(
        config="zeroquant-w8a8", sets=[*sets, "methods.zeroquant.smoothing=0.5"], model=str(model), flags={}
    )
    with pytest.raises(InputError, match=rf"smoothing: {architecture} has nothing from which ranges can migrate"):
        open_job(str(model), recipe)


def test_lkd_true_and_false(tiny: Any, desk: Path, qtool_command: Command) -> None:
    assert not open_job(str(tiny.model), recipe_of(tiny, "methods.zeroquant.lkd=false")).method.learns
    job = open_job(str(tiny.model), recipe_of(tiny, "methods.zeroquant.lkd=true"))
    assert job.method.learns and job.method.options.lkd.steps == 300  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("methods.zeroquant.lkd.inputs=pupil", r"lkd\.inputs"),
        ("methods.zeroquant.lkd.steps=0", r"lkd\.steps"),
        ("methods.zeroquant.lkd.learning_rate=0", r"lkd\.learning_rate"),
        ("methods.zeroquant.lkd.learning_rate=nan", r"lkd\.learning_rate"),
        ("methods.zeroquant.lkd.patients=3", r"zeroquant\.lkd\.unknown option 'patients'.*did you mean patience"),
        ("methods.zeroquant.smoothing=1.5", r"smoothing"),
        ("methods.zeroquant.tuning=10", r"tuning: it tunes the smoothing, which is null"),
        ("weights.rounding=gpqt", r"weights\.rounding"),
    ],
)
def test_options_that_mean_nothing_are_refused(value: str, said: str, tiny: Any) -> None:
    with pytest.raises(InputError, match=said) as caught:
        open_job(str(tiny.model), recipe_of(tiny, value))
    assert "\n" not in str(caught.value)


def test_ibert_says_that_it_rounds_without_data(tiny: Any) -> None:
    recipe = resolve_recipe(config="ibert", sets=("weights.rounding=gptq",), model=str(tiny.model))
    with pytest.raises(InputError, match=r"weights\.rounding: gptq is for zeroquant; ibert takes nearest, mse"):
        open_job(str(tiny.model), recipe)


# --- ranges migrate

DECODERS: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {},
    "LlamaForCausalLM": {"num_key_value_heads": 1},
    "MistralForCausalLM": {"num_key_value_heads": 2, "num_attention_heads": 4, "head_dim": 8},
    "Qwen2ForCausalLM": {"num_key_value_heads": 1},
    "GPTNeoXForCausalLM": {},
    "GPTJForCausalLM": {"rotary_dim": 8},
    "OPTForCausalLM": {"word_embed_proj_dim": 32, "ffn_dim": 48},
}
ENCODERS = ("BertForSequenceClassification", "DistilBertForSequenceClassification")
NAMES = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2}


def migrated(zoo: Any, architecture: str, **options: Any) -> Any:
    """A job whose model has outliers in its activations, with statistics: the job and the migrated reader."""
    extra = NAMES if architecture.startswith("DistilBert") else {}
    maker = zoo.make if architecture in ENCODERS else zoo.causal
    words = {} if architecture in ENCODERS else {"left": True}
    model = maker("float", architecture, change=zoo.noise(0.05), **words, **DECODERS.get(architecture, {}), **extra)
    zoo.write("text.jsonl", zoo.sentences(32), [0] * 32)
    sets = [f"methods.zeroquant.{name}={value}" for name, value in {"smoothing": 0.5, **options}.items()]
    flags: dict[str, Any] = {"data": str(zoo.folder / "text.jsonl"), "batch_size": 8}
    if architecture not in ENCODERS:  # transformers gives Qwen2 a tokenizer of its own, which knows none of the words
        flags = {"batch_size": 8, "num_samples": 32, "max_length": 12}
        sets.append("calibration.source=random")
    job = open_job(str(model), resolve_recipe(config="zeroquant-w8a8", sets=sets, model=str(model), flags=flags))
    batches = calibration_batches(job)
    statistics = pipeline.calibrate(job, batches)
    while True:
        try:
            next(statistics)
        except StopIteration as done:
            return job, batches, job.method.source(job.plan, done.value, job.checkpoint.tensor)


@torch.no_grad()
def through(job: Any, batch: Any, reader: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What leaves the last block, real tokens only, and what enters each linear."""
    seen: dict[str, torch.Tensor] = {}
    stream = Stream(job.model, job.anatomy, reader)
    with stream.loaded(job.anatomy.embeddings):
        hidden, calls = stream.embed(batch)
    for unit, call in zip(job.anatomy.blocks, calls, strict=True):
        handles = [
            job.model.get_submodule(part.path).register_forward_pre_hook(
                lambda _, args, path=part.path: seen.__setitem__(path, args[0])
            )
            for part in unit.parts
        ]
        with stream.loaded(unit):
            hidden = stream.block(unit, hidden, call)
        for handle in handles:
            handle.remove()
    return hidden[batch["attention_mask"].bool()], seen


@pytest.mark.parametrize("tuning", [0, 20])
@pytest.mark.parametrize("architecture", [*DECODERS, *ENCODERS])
def test_the_migrated_model_computes_the_same(architecture: str, tuning: int, zoo: Any) -> None:
    """Up to rounding, though the inputs of its linears are others; every feed of the table moved something."""
    job, batches, reader = migrated(zoo, architecture, tuning=tuning)
    exact, before = through(job, batches.batches[0], job.checkpoint.tensor)
    found, after = through(job, batches.batches[0], reader)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))
    moved = {path for path, tensor in after.items() if (tensor - before[path]).norm() > 1e-3 * before[path].norm()}
    fed = {part.path for unit in job.anatomy.blocks for feed in unit.feeds for part in feed.readers}
    assert moved == fed and fed


def test_smoothing_is_the_formula_of_the_paper(zoo: Any) -> None:
    """For a GPT-2 norm: peak^α / max|W|^(1-α), computed from plain transformers' activations."""
    job, batches, reader = migrated(zoo, "GPT2LMHeadModel")
    peaks = torch.zeros(32)
    for batch in batches.batches:
        _, seen = through(job, batch, job.checkpoint.tensor)
        rows = seen["transformer.h.1.mlp.c_fc"][batch["attention_mask"].bool()]
        peaks = torch.maximum(peaks, rows.abs().amax(0))
    weight = job.checkpoint.tensor("transformer.h.1.mlp.c_fc.weight")
    division = peaks.double().sqrt() / weight.double().abs().amax(1).sqrt()
    for name in ("weight", "bias"):
        wanted = job.checkpoint.tensor(f"transformer.h.1.ln_2.{name}").double() / division
        torch.testing.assert_close(reader(f"transformer.h.1.ln_2.{name}").double(), wanted, rtol=1e-5, atol=1e-7)
    wanted = weight.double() * division[:, None]
    torch.testing.assert_close(reader("transformer.h.1.mlp.c_fc.weight").double(), wanted, rtol=1e-5, atol=1e-7)


def test_outliers_hurt_less(zoo: Any, desk: Path) -> None:
    """A decoder with a few large channels, quantized with and without migration."""

    def spoil(model: Any) -> None:
        for block in model.model.layers:
            block.post_attention_layernorm.weight[:3] *= 40
            for linear in (block.mlp.gate_proj, block.mlp.up_proj):
                linear.weight[:, :3] /= 40
            block.mlp.up_proj.weight[:3] *= 30
            block.mlp.down_proj.weight[:, :3] /= 30

    model = zoo.causal("float", "LlamaForCausalLM", left=True, change=spoil, num_key_value_heads=1)
    zoo.write("text.jsonl", zoo.sentences(32), [0] * 32)
    texts, error = zoo.sentences(20, seed=9), {}
    own = transformers.AutoTokenizer.from_pretrained(model)
    for out, sets in {"plain": [], "smooth": ["smoothing=0.5"], "tuned": ["smoothing=0.5", "tuning=50"]}.items():
        recipe = resolve_recipe(
            config="zeroquant-w8a8",
            sets=[f"methods.zeroquant.{one}" for one in sets],
            model=str(model),
            flags={"data": str(zoo.folder / "text.jsonl")},
        )
        list(quantize_events(str(model), recipe, Path(out)))
        logits = []
        for folder in (model, Path(out)):
            network = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
            with torch.no_grad():
                logits.append(torch.cat([network(**own(text, return_tensors="pt")).logits[0] for text in texts]))
        error[out] = float((logits[0] - logits[1]).square().mean())
    assert error["smooth"] < 0.3 * error["plain"]
    assert error["tuned"] < 0.3 * error["plain"]


def test_static_scales_fit_the_migrated_inputs(tiny: Any, desk: Path) -> None:
    """A value's input is what it was; the output projection's is divided, and its one scale with it."""
    sets = ("activations=int8:tensor:sym", "weights=int8:channel:sym")
    for out, more in {"plain": (), "smooth": ("methods.zeroquant.smoothing=0.5",)}.items():
        run(tiny, out, *sets, *more)
    shutil.rmtree("smooth.qtool-run", ignore_errors=True)
    plain, smooth = (load_file(Path(out) / "model.safetensors") for out in ("plain", "smooth"))
    for index in range(2):
        block = f"bert.encoder.layer.{index}.attention"
        assert torch.equal(plain[f"{block}.self.value.act_scale"], smooth[f"{block}.self.value.act_scale"])
        assert not torch.equal(plain[f"{block}.output.dense.act_scale"], smooth[f"{block}.output.dense.act_scale"])
