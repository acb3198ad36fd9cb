"""`calibration.source=self` from the command line: for every method, beside the other sources, killed and resumed."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.api import calibration_batches, open_job, quantize_events, resolve_recipe
from qtool.calibrate import generation
from qtool.job import Note, Progress

Command = Callable[..., Any]
SELF = ("--set", "calibration.source=self")
FEW = ("--num-samples", "6", "--max-length", "9", "--batch-size", "4")
SETS = ("calibration.source=self", "calibration.num_samples=6", "calibration.max_length=9", "calibration.batch_size=4")
WROTE = "6 sequences that the model wrote itself, seed 0"


@pytest.fixture(scope="module")
def writers(shelf: Any) -> dict[str, Path]:
    return {
        "GPT-2": shelf.causal("own-gpt2"),
        "Llama": shelf.causal("own-llama", "LlamaForCausalLM", bos=True),
        "BERT": shelf.make("own-bert", "BertForMaskedLM"),
        "RoBERTa": shelf.make("own-roberta", "RobertaForMaskedLM"),
    }


@pytest.fixture
def mute(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may write."""
    monkeypatch.setattr(generation, "written_by", lambda *_, **__: pytest.fail("text was written"))


@pytest.mark.parametrize("source", ["self", "random", "builtin", "task", "data"])
@pytest.mark.parametrize(
    ("model", "config"),
    [("GPT-2", "zeroquant-w8a8-static"), ("Llama", "zeroquant-w8a8-static"), ("BERT", "zeroquant-w8a8-static"),
     ("BERT", "ibert"), ("RoBERTa", "ibert")],
)  # fmt: skip
def test_every_method_takes_every_source(
    model: str, config: str, source: str, writers: dict[str, Path], zoo: Any, desk: Path, qtool_command: Command
) -> None:
    texts = zoo.write("texts.jsonl", zoo.sentences(8), [0] * 8)
    asked = {
        "task": ("--task", "masked-lm" if model in ("BERT", "RoBERTa") else "perplexity", "--data", texts),
        "data": ("--data", texts),
    }.get(source, ("--set", f"calibration.source={source}"))
    some = "6" if model in ("BERT", "RoBERTa") else "6 windows of 9 tokens"  # decoders read running text
    described = {
        "self": WROTE,
        "random": "6 random sequences of 9 tokens",
        "builtin": f"{some} of qtool's own 500 sentences",
        "task": f"{some} of the training split of {asked[1]}",
        "data": f"{some} of the rows of texts.jsonl",
    }[source]
    ended = qtool_command("quantize", writers[model], "-c", config, *FEW, *asked, "-o", "out")
    assert ended.code == 0, ended.err
    assert json.loads(Path("out/qtool.json").read_text())["calibration"] == described
    card = Path("out/README.md").read_text()
    assert f"Calibration data: {described}." in card
    assert (f"source: {source}" in card) == (source not in ("task", "data"))
    assert ("the model writes 6 sequences of 9 tokens itself" in ended.err) == (source == "self")
    assert ("write 1/2 batch 1" in ended.err) == ("write 2/2 batch 2" in ended.err) == (source == "self")


@pytest.mark.parametrize("command", ["quantize", "calibrate", "dry run"])
@pytest.mark.parametrize(
    "architecture",
    ["BertForSequenceClassification", "BertForTokenClassification", "BertForQuestionAnswering", "BertModel",
     "GPT2ForSequenceClassification"],
)  # fmt: skip
def test_models_without_a_language_model_head_are_refused(
    architecture: str, command: str, zoo: Any, desk: Path, qtool_command: Command, mute: None
) -> None:
    model = zoo.make("m", architecture)
    given = {"quantize": ("-o", "out"), "calibrate": ("-o", "out"), "dry run": ("--dry-run",)}[command]
    name = "calibrate" if command == "calibrate" else "quantize"
    ended = qtool_command(name, model, "-c", "zeroquant-w8a8-static", *SELF, *given)
    assert (ended.code, len(ended.errors)) == (3, 1), ended.err
    assert ended.errors[0] == (
        f"{architecture} has no language-model head, so it writes no text itself; "
        "use calibration.source=builtin, random, or a file of texts"
    )
    assert list(desk.iterdir()) == []


def test_what_else_keeps_a_model_from_writing(zoo: Any, desk: Path, qtool_command: Command) -> None:
    static = ("quantize", "-c", "zeroquant-w8a8-static", *SELF, "-q", "-o", "out")
    bare = zoo.make("bare", "BertForMaskedLM", words=None)
    no_mask = zoo.make("no-mask", "BertForMaskedLM")
    settings = json.loads((no_mask / "tokenizer_config.json").read_text())
    (no_mask / "tokenizer_config.json").write_text(json.dumps({**settings, "mask_token": None}))
    good = zoo.make("good", "BertForMaskedLM")
    encoder = zoo.make("encoder", "BertForMaskedLM")  # what a class does not use of its files counts for nothing
    config = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    stored = load_file(encoder / "model.safetensors")
    pooler = {f"bert.pooler.dense.{name}": torch.zeros(shape) for name, shape in (("weight", (32, 32)), ("bias", 32))}
    save_file({**stored, **pooler}, encoder / "model.safetensors", metadata={"format": "pt"})
    for model, more, said in [
        (bare, (), "has no tokenizer files"),
        (encoder, (), "BertModel has no language-model head"),
        (no_mask, (), "the tokenizer has no mask token"),
        (good, ("--max-length", "2"), "a maximum length of 2 leaves no room for text"),
    ]:
        ended = qtool_command(*static, model, *more)
        assert (ended.code, len(ended.errors)) == (3, 1), ended.err
        assert said in ended.errors[0]
    assert list(desk.iterdir()) == []


def test_a_recipe_without_calibration_writes_nothing(
    writers: dict[str, Path], desk: Path, qtool_command: Command, mute: None
) -> None:
    ended = qtool_command("quantize", writers["GPT-2"], "-c", "zeroquant-w8a8", *SELF, *FEW, "-o", "out")
    assert ended.code == 0, ended.err
    assert "no calibration pass" in ended.err
    assert json.loads(Path("out/qtool.json").read_text())["calibration"] is None


@pytest.mark.parametrize("model", ["GPT-2", "BERT"])
def test_a_dry_run_says_what_would_be_written(
    model: str, writers: dict[str, Path], tmp_path: Path, desk: Path, qtool_command: Command, mute: None
) -> None:
    dry = ("quantize", writers[model], "-c", "zeroquant-w8a8-static", *FEW, "--dry-run")
    ended = qtool_command(*dry, *SELF, "--json", tmp_path / "plan.json")
    assert ended.code == 0, ended.err
    assert f"Calibration data: {WROTE}." in ended.out
    assert json.loads((tmp_path / "plan.json").read_text())["calibration"] == WROTE
    assert list(desk.iterdir()) == []


@pytest.mark.parametrize("model", ["GPT-2", "BERT"])
def test_the_estimate_counts_every_forward(
    model: str, writers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a second a forward: one a token and batch for decoders, one a group and sweep and batch for the others."""
    from qtool import estimate
    from qtool.api import planned_batches

    monkeypatch.setattr(estimate, "_forward_second", lambda job, batch: 1.0)
    job = open_job(str(writers[model]), resolve_recipe(config="zeroquant-w8a8-static", sets=SETS))
    seconds = estimate._writing(job, planned_batches(job))
    assert seconds == 2 * {"GPT-2": 9, "BERT": generation.SWEEPS * generation.GROUPS}[model]


def test_tasks_go_by_the_names_of_the_table(zoo: Any, tiny: Any, desk: Path, qtool_command: Command) -> None:
    """However a flag, a key of `--data` or a recipe spells them."""
    ended = qtool_command("eval", tiny.model, "--task", "SST-2", "--data", f"sst_2={tiny.data}", "--json", "-")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["task"] == "sst2"
    spelled = {"task": ["sst-2", "WIKITEXT2"], "data": {"SST_2": "here", "wikitext2": "there"}}
    (zoo.folder / "recipe.yaml").write_text(json.dumps({"methods": ["zeroquant"], "evaluate": spelled}))
    found = resolve_recipe(config=str(zoo.folder / "recipe.yaml")).evaluate
    assert found.tasks == ["sst2", "wikitext-2"]
    assert found.data == {"sst2": "here", "wikitext-2": "there"}
    assert resolve_recipe(methods=["zeroquant"], flags={"task": "wikitext2"}).evaluate.task == "wikitext-2"


def drained(events: Iterator[Any]) -> list[Any]:
    return list(events)


@pytest.mark.parametrize(("model", "config"), [("GPT-2", "zeroquant-w8a8-static"), ("BERT", "ibert")])
def test_a_killed_run_resumes_with_the_same_text(model: str, config: str, writers: dict[str, Path], desk: Path) -> None:
    recipe = resolve_recipe(config=config, sets=SETS)
    drained(quantize_events(str(writers[model]), recipe, Path("whole"), remember=False))
    events = quantize_events(str(writers[model]), recipe, Path("parts"), remember=False)
    for event in events:
        if isinstance(event, Progress) and (event.stage, event.unit) == ("quantize", "block.1"):
            break
    events.close()
    assert Path("parts.qtool-run/block.0.safetensors").exists() and not Path("parts").exists()
    torch.set_num_threads(1)  # the recorded threads count
    rest = drained(quantize_events(str(writers[model]), recipe, Path("parts"), resume=True, remember=False))
    assert any(isinstance(event, Note) and WROTE in event.message for event in rest)
    assert Path("parts/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    assert not Path("parts.qtool-run").exists()


def test_an_end_while_the_model_writes_leaves_nothing(writers: dict[str, Path], desk: Path) -> None:
    recipe = resolve_recipe(config="zeroquant-w8a8-static", sets=SETS)
    events = quantize_events(str(writers["GPT-2"]), recipe, Path("out"))
    stages = [next(events) for _ in range(3)]
    assert isinstance(stages[0], Note) and "for that it is in memory whole" in stages[0].message
    assert [isinstance(event, Progress) and event.stage for event in stages[1:]] == ["write", "write"]
    events.close()
    assert list(desk.iterdir()) == []


def test_statistics_of_own_text_serve_quantize(writers: dict[str, Path], desk: Path, qtool_command: Command) -> None:
    static = (writers["GPT-2"], "-c", "zeroquant-w8a8-static", *SELF, *FEW)
    ended = qtool_command("calibrate", *static, "-o", "statistics")
    assert ended.code == 0, ended.err
    assert f"calibration data: {WROTE}" in ended.err
    assert qtool_command("quantize", *static, "--statistics", "statistics", "-o", "one").code == 0
    assert qtool_command("quantize", *static, "-o", "two").code == 0
    assert Path("one/model.safetensors").read_bytes() == Path("two/model.safetensors").read_bytes()
    ended = qtool_command("quantize", *static, "--seed", "1", "--statistics", "statistics", "-o", "three")
    assert ended.code == 3 and "was made with a different data" in ended.errors[0]


def test_seeds_write_different_text_and_scales(writers: dict[str, Path], desk: Path) -> None:
    found = {}
    for seed in (0, 1):
        recipe = resolve_recipe(config="zeroquant-w8a8-static", sets=[*SETS, f"seed={seed}"])
        batches = calibration_batches(open_job(str(writers["GPT-2"]), recipe))
        assert batches.description == f"6 sequences that the model wrote itself, seed {seed}"
        assert [tuple(batch["input_ids"].shape) for batch in batches.batches] == [(4, 9), (2, 9)]
        assert all(batch["attention_mask"].all() for batch in batches.batches)
        drained(quantize_events(str(writers["GPT-2"]), recipe, Path(f"out{seed}"), remember=False))
        found[seed] = batches.digest, load_file(f"out{seed}/model.safetensors")
    assert found[0][0] != found[1][0]
    scales = [name for name in found[0][1] if name.endswith("act_scale")]
    assert scales and any(not torch.equal(found[0][1][name], found[1][1][name]) for name in scales)
