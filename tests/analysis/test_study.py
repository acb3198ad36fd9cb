"""The study as a command: what it measures, against transformers' own attention; kills, resumption, errors."""

import copy
import json
import shutil
import subprocess
import sys
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from qtool import api
from qtool.analysis import study as studies
from qtool.analysis.attention_page import page_of
from qtool.analysis.page import html
from qtool.analysis.sweep import Setting, settings
from qtool.analysis.written import read_study
from qtool.errors import InputError, UnavailableError, UsageError

ARTIFACT = {
    "artifact": "out", "bits": 3, "digest": "0", "score": 88.0, "metrics": {}, "drop": 0.99, "interval": [0.5, 1.5],
    "agreement": 99.0, "kl": 0.01, "seconds": 1.0,
}  # fmt: skip
LOST = object()
SMALL = api.AttentionRequest(thresholds=(0.02, 0.1), bits=(2, 3), bits_thresholds=(0.02,))


def asked(tiny: Any, **options: Any) -> api.AttentionRequest:
    exam = {"data": str(tiny.data), "limit": 20, "batch_size": 8, **options.pop("exam", {})}
    return api.AttentionRequest(**{**vars(SMALL), "exam": exam, **options})


def run(tiny: Any, out: Path, request: Any = None, **choices: Any) -> Any:
    return api.analyze_attention(tiny.model, "sst2", out, request or asked(tiny), **choices)


def texts_of(tiny: Any, limit: int) -> list[str]:
    lines = (tiny.data / "validation.jsonl").read_text().splitlines()[:limit]
    return [json.loads(line)["sentence"] for line in lines]


@pytest.fixture(scope="module")
def finished(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("study") / "out"
    return out, run(tiny, out)


def test_sparsity_is_that_of_each_text_alone(tiny: Any, finished: Any) -> None:
    """Texts one by one through eager attention: no padding anywhere."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny.model, attn_implementation="eager")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.model)
    seen: list[list[Any]] = [[[], []], [[], []]]
    lengths = []
    with torch.no_grad():
        for text in texts_of(tiny, 20):
            inputs = tokenizer(text, return_tensors="pt")
            lengths.append(inputs["input_ids"].shape[1])
            for layer, found in enumerate(model.eval()(**inputs, output_attentions=True).attentions):
                for head in range(2):
                    seen[layer][head].append(found[0, head].flatten().numpy())
    _, body = finished
    distribution = body["distribution"]
    assert distribution["sequences"] == 20
    assert distribution["mean_length"] == pytest.approx(np.mean(lengths))
    assert distribution["pairs"] == sum(length * length for length in lengths)
    assert distribution["rows"] == sum(lengths)
    for layer in range(2):
        for head in range(2):
            flat = np.concatenate(seen[layer][head])
            shares = [(flat <= limit).mean() for limit in (0.02, 0.1)]
            assert distribution["layers"][layer]["heads"][head]["sparsity"] == pytest.approx(shares, abs=1e-12)
    assert distribution["check"]["agreement"] == 100.0
    assert distribution["check"]["kl"] < 1e-9


def test_points_and_their_zeros(tiny: Any, finished: Any) -> None:
    _, body = finished
    keys = [Setting(p["threshold"], p["bits"], p["mapping"]).key for p in body["points"]]
    assert keys == [setting.key for setting in settings((0.02, 0.1), (2, 3), (0.02,))]
    assert keys[:3] == ["pruned at 0.02", "pruned at 0.1", "log, 2 bits, pruned at 0.02"]
    assert body["complete"] and body["planned"] == len(keys) == 10
    assert {p["pairs"] for p in body["points"]} == {body["distribution"]["all"]["pairs"]}
    # The first layer sees the same in the float and in the pruned model; later layers nearly so.
    pruned = body["points"][0]
    assert pruned["zeros"] == pytest.approx(body["distribution"]["all"]["sparsity"][0], abs=0.02)
    assert body["points"][1]["zeros"] > pruned["zeros"]
    assert all(point["score"] is not None and point["kl"] > 0 for point in body["points"])


def test_what_is_written(finished: Any) -> None:
    out, body = finished
    assert sorted(path.name for path in out.iterdir()) == ["attention.html", "attention.json"]
    assert json.loads((out / "attention.json").read_text()) == json.loads(json.dumps(body))


def without_seconds(body: Any) -> Any:
    points = [{name: value for name, value in point.items() if name != "seconds"} for point in body["points"]]
    return {**body, "points": points, "float": {**body["float"], "seconds": None}}


class Killed(BaseException):
    """As a signal would be."""


@pytest.mark.parametrize("stage", ["look at attention", "pruned at 0.1", "linear, 2 bits, not pruned"])
def test_a_killed_study_goes_on(tiny: Any, tmp_path: Path, finished: Any, stage: str) -> None:
    def kill(name: str, done: int, total: int) -> None:
        if name == stage and done == 2:
            raise Killed

    with pytest.raises(Killed):
        run(tiny, tmp_path, progress=kill)
    left = tmp_path / "attention.json"
    if stage == "look at attention":
        assert not left.exists()
    else:
        kept = json.loads(left.read_text())
        assert not kept["complete"] and kept["points"]
        assert "Unfinished" in (tmp_path / "attention.html").read_text()
    measured: list[str] = []
    found = run(tiny, tmp_path, resume=True, progress=lambda name, done, total: measured.append(name))
    assert without_seconds(found) == without_seconds(finished[1])
    if stage == "pruned at 0.1":
        assert "pruned at 0.02" not in measured and "pruned at 0.1" in measured


def test_more_points_are_added_to_what_is_known(tiny: Any, tmp_path: Path) -> None:
    first = run(tiny, tmp_path, asked(tiny, thresholds=(0.1,), bits=(3,)))
    measured: list[str] = []
    request = asked(tiny, thresholds=(0.1,), bits=(2, 3))
    found = run(tiny, tmp_path, request, resume=True, progress=lambda name, done, total: measured.append(name))
    assert "log, 2 bits, pruned at 0.02" in measured
    assert not {"look at attention", "pruned at 0.1", "log, 3 bits, pruned at 0.02"} & set(measured)
    assert found["distribution"] == first["distribution"] and found["points"][0] == first["points"][0]
    finished: list[str] = []
    assert run(tiny, tmp_path, request, resume=True, progress=lambda name, *_: finished.append(name)) == found
    assert not finished


def test_less_that_is_asked_for_drops_nothing(tiny: Any, tmp_path: Path) -> None:
    first = run(tiny, tmp_path, asked(tiny, thresholds=(0.02, 0.1), bits=(3,)))
    narrow = run(tiny, tmp_path, asked(tiny, thresholds=(0.1,), sweep=False), resume=True)
    assert without_seconds(narrow)["distribution"] == without_seconds(first)["distribution"]
    assert {*map(str, narrow["points"])} == {*map(str, first["points"])} and narrow["planned"] == len(first["points"])


def test_other_settings_are_named(tiny: Any, tmp_path: Path) -> None:
    run(tiny, tmp_path, asked(tiny, sweep=False))
    for exam, named in (({"limit": 10}, "data"), ({"batch_size": 4}, "batch_size")):
        with pytest.raises(InputError, match=rf"different {named};.*--resume.*--overwrite"):
            run(tiny, tmp_path, asked(tiny, sweep=False, exam=exam), resume=True)
    with pytest.raises(InputError, match="holds a study"):
        run(tiny, tmp_path)
    body = run(tiny, tmp_path, asked(tiny, sweep=False, exam={"limit": 10}), overwrite=True)
    assert body["points"] == [] and body["distribution"]["sequences"] == 10


def test_one_study_at_a_time_writes_a_folder(tiny: Any, tmp_path: Path, finished: Any, qtool_command: Any) -> None:
    """A second one, in this process or another, is told so and changes nothing; a lock that was left behind is none."""
    out, refused = tmp_path / "out", []
    arguments = ["analyze", "attention", tiny.model, "--task", "sst2", "--data", tiny.data, "-o", out]

    def again(name: str, done: int, total: int) -> None:
        if name == "pruned at 0.1" and done == total:
            before = {path.name: path.read_bytes() for path in out.iterdir()}
            for choice in ((), ("--resume",), ("--overwrite",)):
                refused.append(qtool_command(*arguments, *choice))
            assert {path.name: path.read_bytes() for path in out.iterdir()} == before
            take = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
            command = [sys.executable, "-c", take, out / "attention.lock"]
            refused.append(subprocess.run(command, capture_output=True, check=False))

    out.mkdir()
    (out / "attention.lock").write_text("left by a killed run")
    assert without_seconds(run(tiny, out, progress=again)) == without_seconds(finished[1])
    *ended, other = refused
    said = f"another qtool process is writing {out}; wait for it to end"
    assert [(one.code, one.errors) for one in ended] == [(3, [said])] * 3
    assert b"BlockingIOError" in other.stderr
    assert sorted(path.name for path in out.iterdir()) == ["attention.html", "attention.json"]
    assert run(tiny, out, resume=True)["complete"]


def test_a_study_that_never_began_leaves_no_folder(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        run(tiny, tmp_path / "out", asked(tiny, exam={"data": str(tmp_path / "nowhere")}))
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match="cannot write"):
        run(tiny, tmp_path / "file" / "out")


def test_foreign_files_are_not_resumed(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "attention.json").write_text('{"study": "heads"}')
    with pytest.raises(InputError, match="is no study of attention"):
        run(tiny, tmp_path, resume=True)
    (tmp_path / "attention.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        run(tiny, tmp_path, resume=True)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value of a JSON value is, but of lists only the first and the last."""
    inside = [*value.items()] if isinstance(value, dict) else [*enumerate(value)] if isinstance(value, list) else []
    chosen = {id(one): one for one in (inside if isinstance(value, dict) else inside[:1] + inside[-1:])}.values()
    return [path, *(deeper for key, one in chosen for deeper in places(one, (*path, key)))]


def test_whatever_is_damaged_is_said_or_does_not_matter(study_body: Any, tmp_path: Path) -> None:
    """Each value of a study is lost or becomes another: either that is refused in a line, or the page can be drawn."""
    file, whole = tmp_path / "attention.json", study_body(layers=1, heads=2, artifacts=[ARTIFACT])
    file.write_text(json.dumps(whole))
    assert read_study(file) == whole
    refused = 0
    for *outer, key in places(whole)[1:]:
        for change in (LOST, None, "text", -1, []):
            body = copy.deepcopy(whole)
            holder = reduce(lambda value, step: value[step], outer, body)
            holder[key] = change
            if change is LOST:
                del holder[key]
            file.write_text(json.dumps(body))
            try:
                known = read_study(file)
            except InputError as error:
                assert str(error).count("is damaged (") + str(error).count("is no study") == 1
                assert "\n" not in str(error)
                refused += 1
            else:  # what the study builds on; the rest it says anew
                kept = {name: known[name] for name in ("float", "distribution", "points", "artifacts")}
                assert html(page_of({**whole, **kept}))
    assert refused > 500


def test_a_damaged_study_is_one_line(tiny: Any, tmp_path: Path, finished: Any, qtool_command: Any) -> None:
    arguments = ["analyze", "attention", tiny.model, "--task", "sst2", "--data", tiny.data, "-o", tmp_path]
    body = json.loads(json.dumps(finished[1]))
    del body["points"][1]["bits"]
    (tmp_path / "attention.json").write_text(json.dumps(body))
    ended = qtool_command(*arguments, "--resume")
    said = f"{tmp_path}/attention.json is damaged (points.1.bits: Field required); start again with --overwrite"
    assert (ended.code, ended.errors) == (3, [said])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thresholds": (0.0,)}, "between 0 and 1"),
        ({"bits_thresholds": (1.5,)}, "between 0 and 1"),
        ({"bits": (9,)}, "2 to 8 bits"),
        ({"thresholds": ()}, "at least one threshold"),
        ({"artifacts": ("a",), "sweep": False}, "shown by its scores"),
    ],
)
def test_what_cannot_be_asked(tiny: Any, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(tiny, tmp_path / "out", asked(tiny, **change))
    assert not (tmp_path / "out").exists()


def test_an_artifact_beside_the_plain_forms(tiny: Any, desk: Path) -> None:
    """The paper's form by the method `logattn` is the paper's form of the sweep."""
    import qtool

    sets = ["methods.logattn.threshold=0.02", "methods.logattn.bits=3"]
    qtool.quantize(str(tiny.model), config="logattn-paper", set=sets, output="coded")
    request = asked(tiny, thresholds=(0.02,), bits=(3,), artifacts=("coded",))
    body = run(tiny, Path("study"), request)
    (found,) = body["artifacts"]
    (plain,) = [p for p in body["points"] if (p["bits"], p["mapping"], p["threshold"]) == (3, "log", 0.02)]
    assert (found["artifact"], found["bits"]) == ("coded", 3)
    assert found["kl"] == pytest.approx(plain["kl"], rel=1e-3)
    assert (found["score"], found["agreement"]) == (plain["score"], plain["agreement"])
    assert "The artifact coded (3 bits) has" in Path("study/attention.html").read_text()
    measured: list[str] = []
    run(tiny, Path("study"), request, resume=True, progress=lambda name, *_: measured.append(name))
    assert measured == []
    # The same tensors, used in another way: only config.json differs.
    sets.append("methods.logattn.renormalize=true")
    qtool.quantize(str(tiny.model), config="logattn-paper", set=sets, output="coded", overwrite=True)
    again = run(tiny, Path("study"), request, resume=True)
    assert again["points"] == body["points"] and again["artifacts"][0]["kl"] != found["kl"]


def test_what_is_no_artifact_is_said_at_once(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a model that qtool quantized"):
        run(tiny, tmp_path / "out", asked(tiny, artifacts=(str(tiny.model),)))
    assert not (tmp_path / "out" / "attention.json").exists()


def test_an_artifact_of_another_model_is_refused(tiny: Any, desk: Path, zoo: Any, qtool_command: Any) -> None:
    """By the digest of its source, wherever that lies now; without one by its shape."""
    import qtool

    def studied(artifact: str, model: Any = tiny.model) -> Any:
        chosen = ("--limit", 4, "--thresholds", "0.02", "--bits", "3", "--artifact", artifact, "--overwrite")
        data = ("--task", "sst2", "--data", tiny.data, "--allow-weak-baseline")
        return qtool_command("analyze", "attention", model, *data, "-o", "study", *chosen)

    labels = ("negative", "positive")
    others = {
        "twin": zoo.make("twin", labels=labels, seed=1),
        "deep": zoo.make("deep", labels=labels, num_hidden_layers=3),
        "many": zoo.make("many", labels=labels, num_attention_heads=4),
    }
    for name, source in {"own": tiny.model, **others}.items():
        qtool.quantize(str(source), method="zeroquant", output=f"{name}-out")
    moved = Path(shutil.copytree(tiny.model, "moved"))
    assert studied("own-out").code == 0 and studied("own-out", moved).code == 0
    said = {}
    for name in others:
        ended = studied(f"{name}-out")
        assert (ended.code, len(ended.errors)) == (3, 1), ended.err
        said[name] = ended.errors[0]
    assert "twin-out was made of other weights, or another config, than" in said["twin"]
    assert f"(its source was {others['twin']})" in said["twin"]
    assert "num_hidden_layers is 3 there, and 2 here" in said["deep"]
    assert "num_attention_heads is 4 there, and 2 here" in said["many"]
    for name in ("twin", "deep"):
        Path(f"{name}-out/qtool.json").unlink()
    assert studied("deep-out").errors == [said["deep"]]
    assert studied("twin-out").code == 0  # nothing tells them apart any more
    body = json.loads(Path("own-out/config.json").read_text())
    body["quantization_config"]["modules"]["classifier"] = {"bits": 3}
    Path("own-out/config.json").write_text(json.dumps(body))
    assert studied("own-out").errors[0].startswith("own-out: quantization_config describes module 'classifier' wrongly")


def test_a_decoder(zoo: Any, tmp_path: Path) -> None:
    """Causal attention: a row of query i has i + 1 tokens."""
    model = zoo.causal("gpt2")
    text = zoo.write("text.jsonl", zoo.sentences(60), [0] * 60)
    request = api.AttentionRequest(
        thresholds=(0.05,), bits=(3,), exam={"data": str(text), "max_length": 8, "limit": 3}, allow_weak_baseline=True
    )
    body = api.analyze_attention(model, "perplexity", tmp_path / "out", request)
    assert body["distribution"]["pairs"] == 3 * 36
    assert body["distribution"]["mean_keys"] == 4.5
    assert body["distribution"]["mean_length"] == 8
    assert len(body["points"]) == 5


def test_the_command(tiny: Any, tmp_path: Path, qtool_command: Any) -> None:
    arguments = ["analyze", "attention", tiny.model, "--task", "sst2", "--data", tiny.data, "-o", tmp_path / "out"]
    options = ["--limit", 12, "--thresholds", "0.02,0.1", "--bits", "3"]
    ended = qtool_command(*arguments, *options, "--json", "-")
    assert ended.code == 0, ended.err
    body = json.loads(ended.out)
    assert (body["schema_version"], body["study"], len(body["points"])) == (1, "attention", 6)
    assert "look at attention" in ended.err
    shown = qtool_command(*arguments, *options, "--resume", "-q")
    assert shown.code == 0 and "scores against threshold" in shown.out and "attention.html shows it" in shown.out
    assert shown.err == ""
    assert qtool_command(*arguments, *options).code == 3
    assert qtool_command(*arguments, "--bits", "three").errors == ["--bits is a list such as 2,3,4, not 'three'"]


def test_models_that_cannot_be_looked_at(zoo: Any, tmp_path: Path, qtool_command: Any) -> None:
    model = zoo.causal("gptj", "GPTJForCausalLM", n_embd=32, n_layer=2, n_head=2, rotary_dim=4)
    text = zoo.write("text.jsonl", zoo.sentences(60), [0] * 60)
    ended = qtool_command(
        "analyze", "attention", model, "--task", "perplexity", "--data", text, "--window", 8, "-o", tmp_path / "out"
    )
    assert ended.code == 3 and len(ended.errors) == 1
    assert "GPTJForCausalLM does not attend through transformers' registry" in ended.errors[0]


def test_asked_has_the_papers_defaults() -> None:
    wanted = studies.Asked()
    assert len(wanted.settings()) == 7 + 7 * 2 * 2
    assert studies.Asked(sweep=False).settings() == []
