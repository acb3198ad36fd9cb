"""The command line: what it prints and where, how it ends, and that errors are one line that leaves nothing behind."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import qtool
from qtool import cli, pipeline
from qtool.errors import RESUMABLE
from qtool.methods import METHODS
from qtool.recipe import presets

Command = Callable[..., Any]

COMMANDS = ("quantize", "calibrate", "eval", "run", "bench", "inspect", "methods", "schema", "doctor", "demo")


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: contents of files, None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def document(text: str) -> dict[str, Any]:
    """Exactly one JSON document (NaN is none), with a schema version."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    parsed: dict[str, Any] = json.loads(text, parse_constant=refuse)
    assert parsed["schema_version"] == 1
    assert "\x1b" not in text
    return parsed


@pytest.fixture
def artifact(tiny: Any, desk: Path, qtool_command: Command) -> Path:
    """The tiny model, quantized into `out`."""
    ended = qtool_command("quantize", tiny.model, "--method", "zeroquant", "-o", "out", "-q")
    assert ended.code == 0, ended.err
    return desk / "out"


def scored(tiny: Any) -> tuple[Any, ...]:
    """Arguments that say what to score."""
    return ("--task", "sst2", "--data", tiny.data)


# --- help, without torch

HEAVY = """
import sys
from qtool import cli
arguments = sys.argv[1:]
for words in ([], *([name] for name in arguments)):
    sys.argv = ["qtool", *words, "--help"]
    assert cli._status() == 0
heavy = {"torch", "transformers", "numpy", "pydantic", "yaml", "rich", "datasets", "safetensors"} & set(sys.modules)
print("HEAVY", sorted(heavy))
"""


def test_help_imports_nothing_heavy() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", HEAVY, *COMMANDS], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "HEAVY []"
    assert result.stderr == ""


def test_python_m_qtool_and_broken_pipes() -> None:
    """`methods` needs no torch; who closes the pipe early gets no traceback, and no code that could be a verdict."""
    whole = subprocess.run([sys.executable, "-m", "qtool", "methods"], capture_output=True, text=True, check=True)
    assert "zeroquant" in whole.stdout
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        cut = subprocess.run([sys.executable, "-m", "qtool", "methods"], stdout=gone, stderr=subprocess.PIPE, text=True)
    assert (cut.returncode, cut.stderr) == (141, "")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str, qtool_command: Command) -> None:
    ended = qtool_command(name, "-h")
    assert ended.code == 0
    command = cli.cli.commands[name]
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert max(parameter.opts, key=len) in ended.out


def test_top_level_help_lists_commands_and_codes(qtool_command: Command) -> None:
    ended = qtool_command("--help")
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", ended.out, re.MULTILINE)
    assert "5 a quality gate failed" in " ".join(ended.out.split())
    assert qtool_command("--version").out == f"qtool, version {qtool.__version__}\n"


# --- what commands print


def test_quantize_says_what_it_made_and_where(tiny: Any, desk: Path, qtool_command: Command) -> None:
    static = qtool_command("quantize", tiny.model, "-c", "zeroquant-w8a8-static", *scored(tiny), "-o", "static")
    assert "calibration data: 60 of the training split of sst2" in static.err
    ended = qtool_command("quantize", tiny.model, "--method", "zeroquant", *scored(tiny))
    assert ended.code == 0
    assert "no calibration pass" in ended.err
    assert re.match(r"qtool-out/tiny-sst2-zeroquant: [\d.]+ MB of weights \([\d.]+ % of [\d.]+ MB\) in ", ended.out)
    assert len(ended.out.splitlines()) == 1
    assert "\x1b" not in ended.out + ended.err
    assert "\r" not in ended.out + ended.err
    assert Path("qtool-out/latest").read_text() == f"{desk / 'qtool-out' / 'tiny-sst2-zeroquant'}\n"


def test_json_on_stdout_is_one_document_and_nothing_else(tiny: Any, artifact: Path, qtool_command: Command) -> None:
    recipe = {"model": {"name": str(tiny.model)}, "methods": ["zeroquant"]}
    recipe["evaluate"] = {"task": "sst2", "data": str(tiny.data)}
    Path("recipe.yaml").write_text(json.dumps(recipe))
    commands = {
        "quantize": ("quantize", tiny.model, "--method", "zeroquant", "-o", "other"),
        "dry run": ("quantize", tiny.model, "--method", "zeroquant", "--dry-run"),
        "eval": ("eval", artifact, *scored(tiny)),
        "run": ("run", "recipe.yaml", "-o", "third"),
        "inspect": ("inspect", artifact, "--verify"),
        "methods": ("methods",),
        "doctor": ("doctor",),
    }
    found = {}
    for name, command in commands.items():
        ended = qtool_command(*command, "--json", "-")
        assert ended.code == 0, ended.err
        found[name] = document(ended.out)
        to_file = qtool_command(*command, *(["--overwrite"] if name in ("quantize", "run") else []), "--json", "f.json")
        assert to_file.code == 0, to_file.err
        assert document(Path("f.json").read_text()).keys() == found[name].keys()
        assert name == "dry run" or to_file.out.strip(), "a table is still printed beside a JSON file"
    size = (artifact / "model.safetensors").stat().st_size
    assert found["quantize"]["size_bytes"] == found["dry run"]["size_bytes"] == found["inspect"]["size_bytes"] == size
    assert found["run"]["gate"] == {
        "max_drop": None, "min_score": None, "min_agreement": None, "max_kl": None, "passed": True, "failures": [],
    }  # fmt: skip
    for key in ("candidate", "drop", "interval", "agreement", "kl", "n"):
        got, expected = found["run"]["evaluate"][key], found["eval"][key]
        if key == "candidate":
            got, expected = got["score"], expected["score"]
        assert got == expected
    assert found["eval"]["n"] == len((tiny.data / "validation.jsonl").read_text().splitlines())
    assert found["inspect"]["checks"] == {
        "tensor digests": "intact", "file digests": "intact", "golden batch": "agrees",
    }  # fmt: skip
    assert set(found["methods"]["methods"]) == set(METHODS)
    assert found["methods"]["presets"] == list(presets())
    assert found["doctor"]["torch"] == torch.__version__


def test_quiet_leaves_stderr_empty(tiny: Any, desk: Path, qtool_command: Command) -> None:
    assert qtool_command("quantize", tiny.model, "--method", "zeroquant", "-q", "-o", "out").err == ""
    assert qtool_command("eval", "out", *scored(tiny), "-q").err == ""


def test_verbose_is_a_line_for_every_step(tiny: Any, artifact: Path, qtool_command: Command) -> None:
    steps = {}
    for flag in ((), ("-v",)):
        ended = qtool_command("eval", artifact, *scored(tiny), "--batch-size", "4", *flag)
        steps[flag] = [line for line in ended.err.splitlines() if line.startswith("evaluate ")]
    assert [line.split()[1].rstrip(",") for line in steps["-v",]] == [f"{batch}/15" for batch in range(1, 16)]
    assert len(steps[()]) < 15


def test_underscores_are_dashes(tiny: Any, desk: Path, qtool_command: Command) -> None:
    common = ("quantize", tiny.model, "--method", "zeroquant", "-q")
    assert qtool_command(*common, "-o", "a", "--num_samples", "9", "--batch_size", "3").code == 0
    assert qtool_command(*common, "-o", "b", "--num-samples", "9", "--batch-size", "3").code == 0
    assert Path("a/qtool.json").read_bytes() == Path("b/qtool.json").read_bytes()
    assert qtool_command("eval", "a", *scored(tiny), "--max_drop", "100").code == 0
    assert qtool_command(*common, "--dry_run").code == 0


def test_eval_prints_both_models_and_the_drop(tiny: Any, artifact: Path, qtool_command: Command) -> None:
    ended = qtool_command("eval", artifact, *scored(tiny))
    assert ended.code == 0
    assert f"model: {artifact}" in ended.err
    assert re.search(r"^baseline \(float\) +\d+\.\d\d ", ended.out, re.MULTILINE)
    assert re.search(r"^candidate +\d+\.\d\d ", ended.out, re.MULTILINE)
    assert re.search(
        r"^drop [+-]\d+\.\d\d points, 95 % interval \[.*\]; agreement \d+\.\d\d %; KL \S+ nats; ",
        ended.out,
        re.MULTILINE,
    )


def test_eval_takes_the_newest_artifact_and_names_it_first(tiny: Any, desk: Path, qtool_command: Command) -> None:
    ended = qtool_command("eval", *scored(tiny))
    assert (ended.code, len(ended.errors)) == (3, 1)
    assert "quantize something first" in ended.errors[0]
    assert qtool_command("quantize", tiny.model, "--method", "zeroquant", "-q", "-o", "first").code == 0
    assert qtool_command("quantize", tiny.model, "--method", "zeroquant", "-q").code == 0
    ended = qtool_command("eval", *scored(tiny))
    assert ended.err.splitlines()[0] == f"model: {desk / 'qtool-out' / 'tiny-sst2-zeroquant'}"
    assert ended.code == 0
    shutil.rmtree("qtool-out/tiny-sst2-zeroquant")
    ended = qtool_command("eval", *scored(tiny))
    assert (ended.code, len(ended.errors)) == (3, 1)
    assert "is gone; name a model" in ended.errors[0]


def test_eval_writes_nothing_into_a_model(tiny: Any, artifact: Path, qtool_command: Command) -> None:
    before = tree(artifact), tree(tiny.model), tree(tiny.data)
    assert qtool_command("eval", artifact, *scored(tiny), "--predictions", "p.jsonl").code == 0
    assert (tree(artifact), tree(tiny.model), tree(tiny.data)) == before


def test_predictions_are_those_of_plain_transformers(
    tiny: Any, artifact: Path, qtool_command: Command, zoo: Any
) -> None:
    assert qtool_command("eval", artifact, *scored(tiny), "--predictions", "p.jsonl").code == 0
    rows = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    examples = [json.loads(line) for line in (tiny.data / "validation.jsonl").read_text().splitlines()]
    names = ("negative", "positive")
    texts = [example["sentence"] for example in examples]
    assert [row["label"] for row in rows] == [names[example["label"]] for example in examples]
    for side, model in (("baseline", tiny.model), ("candidate", artifact)):
        assert [row[side] for row in rows] == [names[index] for index in zoo.plain(model, texts).argmax(1)]


# --- gates


def test_gates(tiny: Any, artifact: Path, qtool_command: Command) -> None:
    common = ("eval", artifact, *scored(tiny))
    score = document(qtool_command(*common, "--json", "-").out)["candidate"]["score"]
    for holds in (("--max-drop", "100"), ("--min-score", score), ("--min-agreement", "0"), ("--max-kl", "99")):
        assert qtool_command(*common, *holds).code == 0
    ended = qtool_command(*common, "--min-score", "99.5", "--json", "-")
    assert (ended.code, len(ended.errors)) == (5, 1)
    assert ended.errors[0].startswith("min-score: accuracy is ")
    gate = document(ended.out)["gate"]
    assert gate["passed"] is False
    assert gate["failures"] == ended.errors
    ended = qtool_command(*common, "--max-kl", "0")
    assert (ended.code, len(ended.errors)) == (5, 1)
    assert re.fullmatch(r"max-kl: KL divergence is \S+, limit 0 nats", ended.errors[0])
    for wrong in ("-1", "nan", "inf"):
        assert qtool_command(*common, "--max-kl", wrong).code == 2


def broken(model: Any) -> None:
    model.bert.encoder.layer[1].output.dense.weight.fill_(float("nan"))


def test_a_candidate_that_gives_nan_fails_every_gate(tiny: Any, desk: Path, shelf: Any, qtool_command: Command) -> None:
    candidate = shelf.make("broken", labels=("negative", "positive"), change=broken)
    common = ("eval", candidate, "--baseline", tiny.model, *scored(tiny))
    for gate in (("--max-drop", "100"), ("--min-score", "0"), ("--min-agreement", "0"), ("--max-kl", "1e9")):
        ended = qtool_command(*common, *gate, "--json", "-")
        assert (ended.code, len(ended.errors)) == (5, 1), gate
        found = document(ended.out)
        assert found["gate"]["passed"] is False
        assert found["candidate"]["score"] is None
    assert qtool_command(*common).code == 0


def test_a_gate_without_a_baseline_fails_closed(tiny: Any, desk: Path, shelf: Any, qtool_command: Command) -> None:
    ended = qtool_command("eval", tiny.model, *scored(tiny), "--max-drop", "100")
    assert (ended.code, len(ended.errors)) == (3, 1)
    assert "is a float model itself; pass --baseline" in ended.errors[0]
    source = shelf.folder / "moved"
    shutil.copytree(tiny.model, source)
    assert qtool_command("quantize", source, "--method", "zeroquant", "-q", "-o", "out").code == 0
    shutil.rmtree(source)
    assert qtool_command("eval", "out", *scored(tiny), "--min-score", "1").code == 0
    ended = qtool_command("eval", "out", *scored(tiny), "--max-drop", "100")
    assert (ended.code, len(ended.errors)) == (3, 1)
    assert "is gone" in ended.errors[0]
    assert "pass --baseline" in ended.errors[0]
    shutil.copytree(tiny.model, source)
    (source / "config.json").write_text((source / "config.json").read_text() + "\n")
    ended = qtool_command("eval", "out", *scored(tiny), "--max-drop", "100")
    assert (ended.code, len(ended.errors)) == (3, 1)
    assert "has changed since" in ended.errors[0]


# --- qtool run


@pytest.fixture
def recipe(tiny: Any, desk: Path) -> Callable[..., str]:
    """Writes a recipe for the tiny model, with more sections on request."""

    def written(**more: Any) -> str:
        values = {
            "model": {"name": str(tiny.model)},
            "methods": ["zeroquant"],
            "evaluate": {"task": "sst2", "data": str(tiny.data)},
            "output": "made",
            **more,
        }
        Path("recipe.yaml").write_text(json.dumps(values))
        return "recipe.yaml"

    return written


def test_run_does_everything_and_its_gate_decides(recipe: Callable[..., str], qtool_command: Command) -> None:
    ended = qtool_command("run", recipe(gate={"max_drop": 100, "min_score": 1, "min_agreement": 1}))
    assert (ended.code, ended.errors) == (0, [])
    assert "made: " in ended.out
    assert "drop " in ended.out
    scores = json.loads(Path("made/qtool.json").read_text())["scores"]
    assert [score["task"] for score in scores] == ["sst2"]
    ended = qtool_command("run", recipe(gate={"min_score": 100}, output="other"))
    assert (ended.code, len(ended.errors)) == (5, 1)
    assert "min-score: accuracy is" in ended.errors[0]
    assert "limit 100 points" in ended.errors[0]
    assert Path("other/model.safetensors").read_bytes() == Path("made/model.safetensors").read_bytes()
    ended = qtool_command("run", recipe(gate={"min_score": 100}), "--set", "gate.min_score=1", "--resume")
    assert (ended.code, ended.errors) == (0, [])
    assert qtool_command("inspect", "made", "--verify").code == 0


RUN_ERRORS = [
    ({"model": {}}, 2, "which model?"),
    ({"evaluate": {}}, 3, "evaluate.task is missing"),
    ({"evaluate": {"task": "sst3"}, "calibration": {"source": "random"}}, 3, "unknown task 'sst3'; did you mean sst2"),
    ({"methods": ["zeroquan"]}, 3, "unknown method 'zeroquan'; did you mean zeroquant"),
    ({"gate": {"max_dorp": 1}}, 3, "did you mean max_drop"),
    ({"trust_remote_code": True}, 3, "qtool never runs code"),
]


@pytest.mark.parametrize(("change", "code", "said"), RUN_ERRORS)
def test_run_refuses_before_it_works(
    change: dict[str, Any], code: int, said: str, desk: Path, recipe: Callable[..., str], qtool_command: Command
) -> None:
    file = recipe(**change)
    before = tree(desk)
    ended = qtool_command("run", file)
    assert (ended.code, len(ended.errors)) == (code, 1), ended.err
    assert said in ended.errors[0]
    assert tree(desk) == before


# --- inspect, methods, doctor


def test_inspect_shows_every_module(artifact: Path, qtool_command: Command) -> None:
    ended = qtool_command("inspect", artifact)
    config = json.loads((artifact / "config.json").read_text())["quantization_config"]
    for path, module in config["modules"].items():
        (line,) = [line for line in ended.out.splitlines() if line.split()[:1] == [path]]
        assert module["weights"] in line
    assert "BertForSequenceClassification by zeroquant" in ended.out
    assert "execution real" in ended.out


def test_verify_finds_a_flipped_byte_anywhere(artifact: Path, qtool_command: Command) -> None:
    assert qtool_command("inspect", artifact, "--verify").code == 0
    for name in json.loads((artifact / "qtool.json").read_text())["files"]:
        file = artifact / name
        intact = file.read_bytes()
        damaged = bytearray(intact)
        damaged[-5] ^= 1
        file.write_bytes(damaged)
        ended = qtool_command("inspect", artifact, "--verify")
        assert (ended.code, len(ended.errors)) == (3, 1), name
        file.write_bytes(intact)
    ended = qtool_command("inspect", artifact, "--verify", "--json", "-")
    assert document(ended.out)["damage"] == []


def test_verify_names_the_damaged_tensor(artifact: Path, qtool_command: Command) -> None:
    file = artifact / "model.safetensors"
    data = bytearray(file.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    last = max((n for n in header if n != "__metadata__"), key=lambda name: header[name]["data_offsets"][1])
    data[-1] ^= 1
    file.write_bytes(data)
    ended = qtool_command("inspect", artifact, "--verify", "--json", "-")
    assert ended.code == 3
    assert f"tensor {last} was changed" in ended.errors[0]
    assert document(ended.out)["checks"]["golden batch"] == "not computed: the files are damaged"
    assert qtool_command("inspect", artifact).code == 0, "without --verify, headers alone are read"


def test_verify_of_a_saved_again_model_says_what_it_cannot_check(artifact: Path, qtool_command: Command) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(artifact)
    model.save_pretrained("again")
    ended = qtool_command("inspect", "again", "--verify", "--json", "-")
    assert ended.code == 0, ended.err
    checks = document(ended.out)["checks"]
    assert checks["tensor digests"] == "intact"
    assert checks["golden batch"] == "not recorded: no qtool.json"


def test_methods_and_doctor_print_tables(desk: Path, qtool_command: Command) -> None:
    ended = qtool_command("methods")
    assert ended.code == 0
    rows = {cells[0]: cells for cells in map(str.split, ended.out.splitlines()) if cells}
    for name, entry in METHODS.items():
        assert rows[name][1] == (entry.preset or "none")  # presets of built-in methods are names
    ended = qtool_command("doctor")
    assert ended.code == 0
    assert torch.__version__ in ended.out
    assert "int8 product" in ended.out


# --- errors: one line, the right code, nothing half-written

Break = Callable[[Path], None]


def truncated(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def cut_in_the_header(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50])


def corrupt(model: Path) -> None:
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:40] = os.urandom(32)
    file.write_bytes(data)


def only_pickled(model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")


def with_nan(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["bert.encoder.layer.1.output.dense.weight"][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def without_a_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def edited(**changes: Any) -> Break:
    def edit(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def needing_remote_code(model: Path) -> None:
    edited(model_type="evil", auto_map={"AutoConfig": "evil.Config"}, architectures=["EvilModel"])(model)
    (model / "evil.py").write_text(f"open({str(model / 'ran')!r}, 'w')\n")


def no_json(model: Path) -> None:
    (model / "config.json").write_text("{")


BROKEN_MODELS: dict[str, tuple[Break, str]] = {
    "truncated": (truncated, r"model\.safetensors cannot be read \(truncated, corrupt or missing\)"),
    "cut in the header": (cut_in_the_header, r"model\.safetensors cannot be read"),
    "corrupt": (corrupt, r"model\.safetensors cannot be read"),
    "empty file": (lambda m: (m / "model.safetensors").write_bytes(b""), r"model\.safetensors cannot be read"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), r"has no model\.safetensors"),
    "only pickled": (only_pickled, r"only pickled weights.*convert it with transformers.*save_pretrained"),
    "no config": (lambda m: (m / "config.json").unlink(), r"has no config\.json"),
    "config that is no json": (no_json, r"config\.json cannot be used"),
    "no architecture": (edited(architectures=None), "names no class in `architectures`"),
    "unknown class": (edited(architectures=["BertForSomething"]), "has no class BertForSomething"),
    "another head": (edited(architectures=["BertForMaskedLM"]), "lacks weights of BertForMaskedLM: cls.predictions"),
    "NaN": (with_nan, r"bert\.encoder\.layer\.1\.output\.dense\.weight holds NaN or infinity"),
    "missing tensor": (without_a_tensor, r"lacks weights of .*: bert\.encoder\.layer\.1\.output\.dense\.weight"),
    "other shapes": (edited(intermediate_size=64), r"has shape \[48, 32\], but the config asks for \[64, 32\]"),
    "remote code": (needing_remote_code, "qtool never runs remote code"),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "has no tokenizer files"),
    "damaged tokenizer": (lambda m: (m / "tokenizer.json").write_text("{"), "tokenizer in .* cannot be loaded"),
}


@pytest.mark.parametrize("what", BROKEN_MODELS)
def test_broken_models(what: str, tiny: Any, desk: Path, qtool_command: Command) -> None:
    change, said = BROKEN_MODELS[what]
    model = desk.parent / "model"
    shutil.copytree(tiny.model, model)
    change(model)
    before = tree(model)
    ended = qtool_command("quantize", model, "--method", "zeroquant", *scored(tiny), "-o", "out", "-q")
    assert ended.code == 3, ended.err
    (line,) = ended.err.splitlines()
    assert re.search(said, line), line
    assert tree(model) == before
    left = [path.name for path in desk.iterdir()]
    assert left == (["out.qtool-run"] if what == "NaN" else [])


def labelled(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [{"sentence": f"w{index}", "label": index % 2} for index in range(8)]


def test_errors_of_the_command_line(tiny: Any, desk: Path, shelf: Any, qtool_command: Command) -> None:
    """Every row: arguments, exit code, and what the one line says. Nothing appears in the working directory."""
    data = desk.parent
    empty, blank = data / "empty.jsonl", labelled(data / "blank.jsonl", [{"sentence": " ", "label": 0}] * 3)
    empty.write_text("")
    renamed = labelled(data / "renamed.jsonl", [{"words": "w1", "stars": 1}])
    three = labelled(data / "three.jsonl", [{"sentence": "w1", "label": index % 3} for index in range(6)])
    good = labelled(data / "good.jsonl", ROWS)
    (data / "bad.yaml").write_text("methods: [zeroquant\nseed: 1")
    (data / "remote.yaml").write_text("methods: [zeroquant]\nmodel: {trust_remote_code: true}")
    (data / "key.yaml").write_text("methods: [zeroquant]\nwieghts: int8:channel:sym")
    (data / "file").write_text("in the way")
    classes = shelf.make("three-classes", labels=("a", "b", "c"), num_labels=3)
    both = shelf.make("both", "BertForPreTraining")
    quantize = ("quantize", tiny.model, "--method", "zeroquant", "-o", "out")
    rows: list[tuple[tuple[Any, ...], int, str]] = [
        # the model
        (("quantize", "absent/model/folder", "--method", "zeroquant"), 3, "no model at absent/model/folder"),
        (("quantize", "./absent", "--method", "zeroquant"), 3, "no model at ./absent"),
        (("quantize", "someone/absent", "--method", "zeroquant"), 4, "the hub is not reachable; pass a local folder"),
        (("quantize", data / "file", "--method", "zeroquant"), 3, "is a file; pass the folder"),
        (("quantize", "--method", "zeroquant"), 2, "which model?"),
        (("eval", "./absent", *scored(tiny)), 3, "no model at ./absent"),
        (("inspect", tiny.model), 3, "is not a model that qtool quantized"),
        (("inspect", "./absent"), 3, "no model at ./absent"),
        # heads and tasks
        (("eval", both, *scored(tiny)), 3, "wrong task for the head"),
        (("eval", classes, *scored(tiny)), 3, "wrong task for the head"),
        (("eval", tiny.model, "--task", "classification", "--data", three), 3, "wrong task for the head"),
        (("eval", tiny.model, "--task", "sst2", "--data", three), 3, "label 2 is not one of task 'sst2'"),
        (("quantize", both, "--method", "zeroquant", *scored(tiny)), 3, "BertForPreTraining is not supported"),
        # columns and data
        ((*quantize, "--task", "sst2", "--data", renamed), 3, "has no column sentence; it has words, stars"),
        ((*quantize, "--data", renamed), 3, "has no column that holds text; it has words, stars"),
        ((*quantize, "--data", good, "--text-column", "body"), 3, "has no column body; it has sentence, label"),
        (("eval", tiny.model, "--task", "sst2", "--data", renamed), 3, "has no column sentence; it has words, stars"),
        (("eval", tiny.model, "--task", "sst2", "--data", good, "--label-column", "y"), 3, "has no column y"),
        ((*quantize, "--task", "sst2", "--data", empty), 3, "is empty"),
        ((*quantize, "--data", empty), 3, "is empty"),
        ((*quantize, "--data", blank), 3, "calibration data is empty"),
        (("eval", tiny.model, "--task", "sst2", "--data", empty), 3, "is empty"),
        ((*quantize, "--data", data / "absent.jsonl"), 3, "no data at"),
        ((*quantize, "--task", "sst2", "--data", data / "absent"), 3, "no data at"),
        ((*quantize, "--task", "sst2"), 4, "the hub is not reachable; pass local files with --data"),
        (("eval", tiny.model, "--task", "sst2"), 4, "the hub is not reachable; pass local files with --data"),
        ((*quantize, "--task", "classification"), 2, "has no data of its own"),
        # names
        (("quantize", tiny.model, "--method", "zeroqant"), 2, "unknown method 'zeroqant'; did you mean zeroquant?"),
        (("quantize", tiny.model), 2, "which method?"),
        ((*quantize, "--task", "sst3"), 2, "unknown task 'sst3'; did you mean sst2"),
        (("eval", tiny.model, "--task", "sst3"), 2, "unknown task 'sst3'; did you mean sst2"),
        (("eval", tiny.model, "--task", "sst-2", "--task", "SST2"), 2, "a task is named twice: sst2, sst2"),
        ((*quantize, "--set", "wieghts.group_size=4"), 3, "unknown key 'wieghts'; did you mean weights?"),
        ((*quantize, "--set", "seed"), 2, "--set wants key=value"),
        (("quantize", tiny.model, "-c", data / "key.yaml"), 3, "unknown key 'wieghts'; did you mean weights?"),
        (("quantize", tiny.model, "-c", data / "bad.yaml"), 3, "bad.yaml line 2: not YAML"),
        (("quantize", tiny.model, "-c", data / "absent.yaml"), 3, "no recipe at"),
        (("quantize", tiny.model, "-c", "zeroquant-w4"), 3, "unknown preset 'zeroquant-w4'; did you mean"),
        (("quantize", tiny.model, "-c", data / "remote.yaml"), 3, "qtool never runs code that comes with a model"),
        ((*quantize, "--set", "model.trust_remote_code=true"), 3, "qtool never runs code that comes with a model"),
        # specs
        ((*quantize, "--set", "weights=int8:rows:5:sym"), 3, "layer.0.attention.self.query: groups of 5 rows"),
        ((*quantize, "--set", "weights=int9:channel:sym"), 3, "zeroquant takes static int2 to int8 weights"),
        ((*quantize, "--set", "methods.zeroquant.lkdd=true"), 3, "unknown option 'lkdd'"),
        # places
        (("quantize", tiny.model, "--method", "zeroquant", "-o", data / "file"), 3, "file is not a folder"),
        (("quantize", tiny.model, "--method", "zeroquant", "-o", data / "file" / "x"), 3, "file is a file"),
        (("quantize", tiny.model, "--method", "zeroquant", "-o", tiny.data), 3, "is not empty"),
        (("quantize", tiny.model, "--method", "zeroquant", "-o", "/proc/qtool/x"), 4, "choose another"),
        (("calibrate", tiny.model, "-c", "zeroquant-w8a8-static", "-o", "absent/s"), 3, "absent does not exist"),
        (("eval", tiny.model, *scored(tiny), "--predictions", "p.xml"), 2, "predictions are written as"),
        (("eval", tiny.model, *scored(tiny), "--predictions", "absent/p.csv"), 3, "does not exist"),
        (("eval", tiny.model, *scored(tiny), "--json", "absent/f.json"), 3, "cannot write absent/f.json"),
        ((*quantize, "--statistics", "absent.safetensors"), 3, "absent.safetensors cannot be read"),
    ]
    wrong = []
    for arguments, code, said in rows:
        ended = qtool_command(*arguments, "-q") if arguments[0] != "inspect" else qtool_command(*arguments)
        lines = ended.err.splitlines()
        if ended.code != code or len(lines) != 1 or said not in lines[0] or not lines[0].startswith("qtool: "):
            wrong.append(
                f"{' '.join(map(str, arguments))}: code {ended.code}, expected {code} and {said!r}\n{ended.err}"
            )
        if list(desk.iterdir()):
            wrong.append(f"{' '.join(map(str, arguments))} left {[path.name for path in desk.iterdir()]}")
            shutil.rmtree(desk)
            desk.mkdir()
            os.chdir(desk)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("seed", range(3))
def test_no_truncation_is_ever_a_model(seed: int, tiny: Any, artifact: Path, qtool_command: Command) -> None:
    """Cut the float model's file, and an artifact's, at random places: always an error, never a load."""
    generator = torch.Generator().manual_seed(seed)
    for folder, command in ((tiny.model, ("quantize",)), (artifact, ("eval",)), (artifact, ("inspect",))):
        copy = artifact.parent.parent / f"copy-{command[0]}"
        shutil.copytree(folder, copy)
        data = (copy / "model.safetensors").read_bytes()
        length = int(torch.randint(len(data), (), generator=generator))
        (copy / "model.safetensors").write_bytes(data[:length])
        more = {"quantize": ("--method", "zeroquant", "-o", "new"), "eval": scored(tiny), "inspect": ()}[command[0]]
        ended = qtool_command(*command, copy, *more)
        assert (ended.code, len(ended.errors)) == (3, 1), (command, length, ended.err)
        assert "cannot be read" in ended.errors[0] or "cannot be loaded" in ended.errors[0]


def test_an_output_that_holds_something_is_kept(tiny: Any, desk: Path, qtool_command: Command) -> None:
    Path("out").mkdir()
    Path("out/notes.txt").write_text("precious")
    common = ("quantize", tiny.model, "--method", "zeroquant", "-o", "out", "-q")
    for flags in ((), ("--resume",)):
        ended = qtool_command(*common, *flags)
        assert (ended.code, len(ended.errors)) == (3, 1)
        assert "out is not empty; choose another -o or pass --overwrite" in ended.errors[0]
    ended = qtool_command(*common, "--overwrite")
    assert (ended.code, len(ended.errors)) == (3, 1)
    assert "holds something else than a model that qtool made; remove it yourself" in ended.errors[0]
    assert tree(desk) == {"out": None, "out/notes.txt": b"precious"}
    shutil.rmtree("out")
    assert qtool_command(*common).code == 0
    assert qtool_command(*common).code == 3
    assert qtool_command(*common, "--overwrite").code == 0


def test_an_output_is_never_one_of_the_inputs(tiny: Any, desk: Path, qtool_command: Command) -> None:
    shutil.copytree(tiny.model, "work/model")
    shutil.copytree(tiny.data, "work/data")
    before = tree(desk)
    data = ("--task", "sst2", "--data", "work/data")
    for out in ("work/model", "work/data", "work"):
        for flag in ((), ("--overwrite",), ("--resume",)):
            ended = qtool_command("quantize", "work/model", "--method", "zeroquant", *data, "-o", out, "-q", *flag)
            assert (ended.code, len(ended.errors)) == (3, 1)
            assert tree(desk) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission_to_write(tiny: Any, desk: Path, qtool_command: Command) -> None:
    Path("locked").mkdir(mode=0o500)
    ended = qtool_command("quantize", tiny.model, "--method", "zeroquant", "-o", "locked/out", "-q")
    assert (ended.code, len(ended.errors)) == (4, 1)
    assert "no permission to write in" in ended.errors[0]
    assert list(Path("locked").iterdir()) == []


@pytest.mark.parametrize("limit", [300, 3_000, 30_000])
def test_a_full_disk_is_one_line_and_resumable(limit: int, tiny: Any, desk: Path, qtool_command: Command) -> None:
    """No file may grow beyond `limit` bytes: the record, the unit files and the assembled file fail in turn."""
    common = ("quantize", tiny.model, "--method", "zeroquant", "-o", "out", "-q")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        ended = qtool_command(*common)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ended.code == 4, ended.err
    (line,) = ended.err.splitlines()
    assert "free some space" in line or "free space" in line
    # Nothing to resume, nothing left; the last limit lets all units through and stops their assembly.
    assert [path.name for path in desk.iterdir()] == (["out.qtool-run"] if limit == 30_000 else [])
    assert not list(desk.rglob("*.part"))
    ended = qtool_command(*common, "--resume")
    assert ended.code == 0, ended.err
    assert sorted(path.name for path in desk.iterdir()) == ["out", "qtool-out"]


def test_a_bug_is_code_1_with_its_traceback(
    tiny: Any, desk: Path, qtool_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*args: Any) -> None:
        raise ZeroDivisionError("no such luck")

    monkeypatch.setattr(pipeline, "_write_config", bug)
    ended = qtool_command("quantize", tiny.model, "--method", "zeroquant", "-o", "out", "-q")
    assert ended.code == 1
    assert "Traceback" in ended.err
    assert "ZeroDivisionError: no such luck" in ended.err
    assert "this is a bug in qtool; please report it" in ended.err.splitlines()[-1]


def test_interrupts_in_this_process(
    tiny: Any, desk: Path, qtool_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C, and SIGTERM even where a library swallows exceptions; real processes are in test_pipeline."""

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    def terminate(*args: Any) -> None:
        try:
            with monkeypatch.context() as patch:
                patch.setattr(cli.signal, "signal", lambda *_: None)  # the next one would be ignored here too
                cli._on_signal(15, None)
        except Exception:
            pytest.fail("a termination is no Exception")

    common = ("quantize", tiny.model, "--method", "zeroquant", "-o", "out", "-q", "--resume")
    for signal, code, word in ((interrupt, 130, "interrupted"), (terminate, 143, "terminated")):
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "_write_config", signal)
            ended = qtool_command(*common)
        assert ended.code == code
        assert ended.errors == [f"{word}; {RESUMABLE}"]
        assert [path.name for path in desk.iterdir()] == ["out.qtool-run"]
    assert qtool_command(*common).code == 0


def test_quantizing_twice_is_refused(artifact: Path, qtool_command: Command) -> None:
    ended = qtool_command("quantize", artifact, "--method", "zeroquant", "-o", "twice", "-q")
    assert (ended.code, len(ended.errors)) == (3, 1)
    assert "is quantized already" in ended.errors[0]
    assert "pass the float model" in ended.errors[0]


def test_unknown_commands_and_flags_are_usage(desk: Path, qtool_command: Command) -> None:
    for arguments, said in (
        (("quantise",), "No such command 'quantise'"),
        (("quantize", "x", "--metod", "y"), "--metod"),
        (("eval", "x"), "--task"),
        (("eval", "x", "--task", "sst2", "--max-drop", "-1"), "--max-drop"),
        (("quantize", "x", "--num-samples", "0"), "--num-samples"),
        (("run",), "RECIPE"),
    ):
        ended = qtool_command(*arguments)
        assert ended.code == 2, arguments
        assert said in ended.err
    assert qtool_command().code == 2
