"""`qtool analyze heads` as a command: what it writes, what it keeps, how it ends."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.analysis.heads import Judge
from qtool.errors import InterruptedRun
from qtool.methods.headprune import read_heads

Command = Callable[..., Any]


@pytest.fixture
def analyze(qtool_command: Command, tiny: Any, desk: Path) -> Command:
    """The command on the tiny model and its data; `tiny` has 2 layers of 2 heads."""

    def run(*arguments: Any, model: Path = tiny.model, data: Path = tiny.data, out: str = "study") -> Any:
        return qtool_command("analyze", "heads", model, "--task", "sst2", "--data", data, "-o", out, *arguments)

    return run


def test_result_and_where_it_is_from(analyze: Command, tiny: Any) -> None:
    ended = analyze("--max-drop", "40", "--limit", "30", "--json", "-")
    assert ended.code == 0, ended.err
    body = json.loads(ended.out)
    assert body == json.loads(Path("study/heads.json").read_text())
    assert (body["schema_version"], body["task"], body["metric"], body["search"]) == (1, "sst2", "score", "astar")
    assert body["layers"] == [2, 2] and body["removed"] == sum(map(len, body["heads"].values()))
    searched, told = body["search_set"], body["held_out"]
    assert (searched["split"], searched["n"]) == ("train", 30) and searched["data"].endswith("train.jsonl")
    assert told["split"] == "validation" and told["data"].endswith("validation.jsonl") and told["n"] > 30
    assert searched["whole"] == body["base"] and searched["pruned"] == body["value"] >= body["floor"]
    share = searched["whole"] / 100
    assert searched["standard_error"] == pytest.approx(100 * math.sqrt(share * (1 - share) / 30))
    assert told["interval"]["low"] <= told["drop"] <= told["interval"]["high"]
    assert told["drop"] == pytest.approx(told["whole"] - told["pruned"]) and told["kl"] > 0
    assert "search set" in body["guarantee"]
    assert len(body["ranking"]) == 4 and sorted(row["loss"] for row in body["ranking"]) == [
        row["loss"] for row in body["ranking"]
    ]
    assert [step["heads"] for step in body["trace"][:2]] == [[], [[0, 0]]]
    removed = body["removed"]
    assert body["parameters"]["whole"] - body["parameters"]["pruned"] == removed * (4 * 16 * 32 + 3 * 16)
    if removed:
        assert read_heads(Path("study/heads.json")) == {int(layer): own for layer, own in body["heads"].items()}


def test_tables_and_progress(analyze: Command) -> None:
    ended = analyze("--limit", "20", "-v")
    assert ended.code == 0
    assert "of 4 heads can go" in ended.out and "held out" in ended.out
    assert "less than the standard error" in ended.out
    assert "measure sets of heads" in ended.err


@pytest.mark.parametrize("search", ["astar", "greedy", "gradient"])
def test_a_killed_search_goes_on_to_the_same_result(
    search: str, analyze: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = ("--metric", "kl", "--max-drop", "1", "--search", search)
    assert analyze(*chosen, out="whole").code == 0
    measured = Judge.__call__
    calls = 0

    def dying(self: Judge, heads: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise InterruptedRun("terminated", 15)
        return measured(self, heads)

    monkeypatch.setattr(Judge, "__call__", dying)
    assert analyze(*chosen, out="killed").code == 143
    assert not Path("killed/heads.json").exists()
    refused = analyze(*chosen, out="killed")
    assert refused.code == 3 and "--resume" in refused.errors[0]
    monkeypatch.setattr(Judge, "__call__", measured)
    ended = analyze(*chosen, "--resume", out="killed")
    assert ended.code == 0, ended.err
    assert Path("killed/heads.json").read_bytes() == Path("whole/heads.json").read_bytes()
    assert Path("killed/evaluated.jsonl").read_bytes() == Path("whole/evaluated.jsonl").read_bytes()


def test_another_search_uses_what_is_known(analyze: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert analyze("--metric", "kl", "--max-drop", "1").code == 0
    monkeypatch.delattr(Judge, "__call__")
    ended = analyze("--metric", "kl", "--max-drop", "1", "--search", "greedy", "--resume")
    assert ended.code == 0, ended.err
    assert json.loads(Path("study/heads.json").read_text())["search"] == "greedy"
    other = analyze("--metric", "agreement", "--resume")
    assert other.code == 3 and "different metric" in other.errors[0]


def test_one_file_is_searched_on_its_first_half_and_told_on_the_second(analyze: Command, tiny: Any) -> None:
    ended = analyze("--json", "-", data=tiny.data / "train.jsonl")
    assert ended.code == 0, ended.err
    body = json.loads(ended.out)
    rows = (tiny.data / "train.jsonl").read_text().splitlines()
    halves = [Path("study", name).read_text().splitlines() for name in ("search.jsonl", "held-out.jsonl")]
    assert [json.loads(row) for half in halves for row in half] == [json.loads(row) for row in rows]
    assert body["search_set"]["n"] == len(halves[0]) and body["held_out"]["n"] == len(halves[1])


def test_kept_heads_stay_and_overwrite_starts_again(analyze: Command) -> None:
    chosen = ("--metric", "kl", "--max-drop", "100", "--keep", "0.1", "--keep", "1")
    ended = analyze(*chosen, "--json", "-")
    assert json.loads(ended.out)["heads"] == {"0": [0]}
    assert json.loads(ended.out)["ended"] == "all states were expanded"
    again = analyze(*chosen, "--overwrite", "--json", "-")
    assert json.loads(again.out) == json.loads(ended.out)


def test_one_head_stays_whatever_may_be_lost(analyze: Command) -> None:
    for search in ("astar", "greedy", "gradient"):
        ended = analyze("--metric", "kl", "--max-drop", "1e6", "--search", search, "--json", "-", out=search)
        assert json.loads(ended.out)["removed"] == 3, "headprune leaves one"


def test_what_is_known_stays_until_a_new_search_can_begin(analyze: Command, tmp_path: Path) -> None:
    assert analyze("--limit", "20").code == 0
    before = {path.name: path.read_bytes() for path in Path("study").iterdir()}
    ended = analyze("--overwrite", model=tmp_path / "nowhere")
    assert ended.code == 3
    assert {path.name: path.read_bytes() for path in Path("study").iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--max-drop", "nan"), 2, "max_drop is a number of 0 or more"),
        (("--max-seconds", "inf"), 2, "max_seconds is a number of 0 or more"),
        (("--keep", "x"), 2, "--keep takes LAYER.HEAD"),
        (("--keep", "7"), 3, "there is no head 7 that could be kept"),
        (("--keep", "0.9"), 3, "there is no head 0.9"),
        (("--split", "validation"), 2, "what the result is told on"),
        (("--split", "test"), 3, "has no data for test"),
    ],
)
def test_nonsense_is_one_line(arguments: tuple[str, ...], code: int, said: str, analyze: Command) -> None:
    ended = analyze(*arguments)
    assert ended.code == code
    assert len(ended.errors) == 1 and said in ended.errors[0]


def test_threads_are_as_they_were(analyze: Command) -> None:
    """Also after an error."""
    torch.set_num_threads(2)
    assert analyze("--limit", "20", "--threads", "1").code == 0
    assert torch.get_num_threads() == 2
    used = json.loads(Path("study/evaluated.jsonl").read_text().splitlines()[0])["fingerprint"]["threads"]
    assert used == 1
    assert analyze("--threads", "1", data=Path("nowhere"), out="other").code == 3
    assert torch.get_num_threads() == 2


def test_headprune_takes_what_was_found_of_this_model_alone(
    analyze: Command, qtool_command: Command, tiny: Any
) -> None:
    """Not of one with the same shapes; a file that does not say of which is taken."""
    assert analyze("--metric", "kl", "--max-drop", "100", "--target", "1", "--limit", "20").code == 0
    file = Path("study/heads.json")

    def prune(model: Path) -> Any:
        chosen = ("--method", "headprune", "--set", f"methods.headprune.file={file}")
        return qtool_command("quantize", model, *chosen, "--dry-run")

    moved = Path(shutil.copytree(tiny.model, "moved"))
    for model in (tiny.model, moved):
        ended = prune(model)
        assert ended.code == 0, ended.err
    weights = load_file(moved / "model.safetensors")
    weights["bert.embeddings.word_embeddings.weight"][7, 3] += 0.5
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    ended = prune(moved)
    assert ended.code == 3 and len(ended.errors) == 1
    assert "study/heads.json is not about moved as it is now; search it with `qtool analyze heads`" in ended.errors[0]
    body = json.loads(file.read_text())
    for record in (None, {}, {"model": 3}):
        file.write_text(json.dumps({**body, "fingerprint": record}))
        assert prune(tiny.model).code == 3
    del body["fingerprint"]
    file.write_text(json.dumps(body))
    assert prune(moved).code == 0


def test_other_files_are_left_alone(analyze: Command) -> None:
    Path("study").mkdir()
    Path("study/thesis.txt").write_text("mine")
    ended = analyze("--overwrite")
    assert ended.code == 3 and "thesis.txt" in ended.errors[0]
    assert Path("study/thesis.txt").read_text() == "mine"


def test_quantized_models_and_guessing_ones_are_refused(
    analyze: Command, qtool_command: Command, tiny: Any, zoo: Any
) -> None:
    assert qtool_command("quantize", tiny.model, "--method", "zeroquant", "-o", "small").code == 0
    ended = analyze(model=Path("small"))
    assert ended.code == 3 and "is quantized" in ended.errors[0]
    texts = zoo.sentences(20)
    wrong = [1 - answer for answer in zoo.plain(tiny.model, texts).argmax(1).tolist()]
    rows = zoo.write("wrong/train.jsonl", texts, wrong)
    zoo.write("wrong/validation.jsonl", texts, wrong)
    ended = analyze(data=rows.parent, out="other")
    assert ended.code == 3 and "no better than" in ended.errors[0]
