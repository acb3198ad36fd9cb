"""The pipeline's promises: the same bytes every time, whatever interrupts it, and nothing read or written in vain."""

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import qtool
from qtool import artifact, checkpoint, job, lowering, pipeline
from qtool.api import calibration_batches, open_job, quantize_events, resolve_recipe
from qtool.errors import RESUMABLE, InputError, QtoolError
from qtool.nn.plan import one_by_one
from qtool.rundir import RunDirectory, beside

Command = Callable[..., Any]

DECIDING = ("model.safetensors", "config.json")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def deciding(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files(folder).items() if name in DECIDING}


def run_folders(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if ".qtool-" in path.name]


def recipe_of(tiny: Any, config: str = "zeroquant-w8a8-static", *sets: str) -> Any:
    return resolve_recipe(config=config, sets=sets, model=str(tiny.model), flags={"task": "sst2", "data": tiny.data})


def completed(events: Iterator[Any]) -> list[Any]:
    return list(events)


# --- the same bytes


def test_two_runs_give_the_same_files(tiny: Any, desk: Path) -> None:
    for out in ("one", "two"):
        completed(quantize_events(str(tiny.model), recipe_of(tiny), Path(out)))
    assert files(Path("one")) == files(Path("two"))
    assert set(DECIDING) <= set(files(Path("one")))


def test_bytes_do_not_depend_on_places_and_names(tiny: Any, desk: Path, zoo: Any) -> None:
    completed(quantize_events(str(tiny.model), recipe_of(tiny), Path("one")))
    shutil.copytree(tiny.model, "elsewhere/copy")
    completed(quantize_events("elsewhere/copy", recipe_of(tiny), Path("deep/er/two")))
    assert deciding(Path("one")) == deciding(Path("deep/er/two"))
    for content in deciding(Path("one")).values():
        assert str(tiny.model).encode() not in content


def test_a_units_seed_is_what_the_design_says() -> None:
    digest = hashlib.sha256(b"7:block.3").digest()
    seed = job.unit_seed(7, "block.3")
    assert seed == int.from_bytes(digest[:8], "big", signed=True)
    assert torch.manual_seed(seed).initial_seed() % 2**64 == int.from_bytes(digest[:8], "big")


def test_every_unit_is_lowered_under_its_own_seed(tiny: Any, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a run that was resumed, and whatever drew random numbers before."""
    seeds: dict[str, int] = {}
    write = lowering._write_unit

    def noted(job: Any, unit: Any, *rest: Any) -> None:
        seeds[unit.name] = torch.initial_seed()
        torch.rand(7)
        write(job, unit, *rest)

    monkeypatch.setattr(lowering, "_write_unit", noted)
    completed(quantize_events(str(tiny.model), recipe_of(tiny, "zeroquant-w8a8", "seed=7"), Path("out")))
    digests = {name: hashlib.sha256(f"7:{name}".encode()).digest()[:8] for name in seeds}
    assert {name: seed % 2**64 for name, seed in seeds.items()} == {
        name: int.from_bytes(digest, "big") for name, digest in digests.items()
    }
    assert list(seeds) == ["embeddings", "block.0", "block.1", "head"]


def test_the_source_is_only_read(tiny: Any, desk: Path) -> None:
    before = files(tiny.model)
    completed(quantize_events(str(tiny.model), recipe_of(tiny), Path("out")))
    assert files(tiny.model) == before


def test_one_metadata_key_in_the_weights(tiny: Any, desk: Path) -> None:
    completed(quantize_events(str(tiny.model), recipe_of(tiny), Path("out")))
    data = Path("out/model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}


def test_the_recorded_recipe_makes_the_model_again(tiny: Any, desk: Path, qtool_command: Command) -> None:
    rules = "rules={'*': {weights: 'int8:tensor:sym'}, '*.attention.*': {weights: 'int8:group:16:sym'}, '*.1.*': float}"
    completed(quantize_events(str(tiny.model), recipe_of(tiny, "zeroquant-w8a8-static", rules), Path("one")))
    report = json.loads(Path("one/qtool.json").read_text())
    Path("again.json").write_text(json.dumps(report["recipe"]))
    assert list(report["recipe"]["rules"]) == ["*", "*.attention.*", "*.1.*"]
    ended = qtool_command("quantize", tiny.model, "-c", "again.json", "-o", "two")
    assert ended.code == 0, ended.err
    assert deciding(Path("one")) == deciding(Path("two"))


def test_the_report_says_what_was_done(tiny: Any, desk: Path) -> None:
    completed(quantize_events(str(tiny.model), recipe_of(tiny), Path("out")))
    report = json.loads(Path("out/qtool.json").read_text())
    assert report["calibration"] == "60 of the training split of sst2"
    assert report["architecture"] == "BertForSequenceClassification"
    assert report["source"]["name"] == str(tiny.model)
    assert report["fingerprint"]["threads"] == torch.get_num_threads()
    assert report["fingerprint"]["versions"]["torch"] == torch.__version__
    listed = {name: hashlib.sha256(content).hexdigest() for name, content in files(Path("out")).items()}
    assert report["files"] == {n: d for n, d in listed.items() if n not in ("qtool.json", "README.md")}
    config = json.loads(Path("out/config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["version"], config["methods"]) == ("qtool", 1, ["zeroquant"])
    stored = load_file("out/model.safetensors")
    assert config["tensors"] == artifact.manifest_of_tensors(stored)


# --- events


def test_progress_covers_every_unit_once_and_in_order(tiny: Any, desk: Path) -> None:
    events = completed(quantize_events(str(tiny.model), recipe_of(tiny), Path("out")))
    progress = [event for event in events if isinstance(event, job.Progress)]
    started = [(event.stage, event.unit) for event in progress if event.seconds is None]
    ended = [(event.stage, event.unit) for event in progress if event.seconds is not None]
    assert started == ended
    assert started == [
        *(("calibrate", unit) for unit in ("embeddings", "block.0", "block.1")),
        *(("quantize", unit) for unit in ("embeddings", "block.0", "block.1", "head")),
        ("publish", "assemble"),
        ("publish", "golden check"),
    ]
    for event in progress:
        assert 0 <= event.index < event.total
        assert event.seconds is None or (event.seconds >= 0 and event.peak_bytes > 1e7)


def test_without_static_scales_there_is_no_pass_over_the_data(tiny: Any, desk: Path) -> None:
    events = completed(quantize_events(str(tiny.model), recipe_of(tiny, "zeroquant-w8a8"), Path("out")))
    assert not [event for event in events if getattr(event, "stage", "") == "calibrate"]


# --- memory: a unit at a time


def test_one_unit_in_memory_at_a_time(tiny: Any, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While any unit is loaded, all the others are on the meta device."""
    from qtool.stream import Stream

    loaded = Stream.loaded
    seen: list[set[str]] = []

    @contextmanager
    def watched(self: Any, unit: Any) -> Iterator[None]:
        with loaded(self, unit):
            present = [name for name, value in self.model.state_dict().items() if value.device.type != "meta"]
            assert all(unit.owns(name) or unit.kind == "head" for name in present)
            seen.append({unit.name})
            yield
        assert all(value.device.type == "meta" for value in self.model.state_dict().values())

    monkeypatch.setattr(Stream, "loaded", watched)
    completed(quantize_events(str(tiny.model), recipe_of(tiny), Path("out")))
    assert len(seen) == 3 + 4


# --- dry runs


@contextmanager
def headers_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test that reads a tensor: open files give names, dtypes and shapes only."""

    class Slice:
        def __init__(self, inner: Any) -> None:
            self.get_dtype, self.get_shape = inner.get_dtype, inner.get_shape

    class Headers:
        def __init__(self, inner: Any) -> None:
            self.keys = inner.keys
            self.get_slice = lambda name: Slice(inner.get_slice(name))

    opened = checkpoint.opened

    @contextmanager
    def guarded(file: Path) -> Iterator[Any]:
        with opened(file) as inner:
            yield Headers(inner)

    with monkeypatch.context() as patch:
        for module in (checkpoint, artifact, lowering):
            patch.setattr(module, "opened", guarded)
        yield


@pytest.mark.parametrize(
    ("architecture", "sets"),
    [
        ("BertForSequenceClassification", ()),
        ("BertForSequenceClassification", ("weights.group_size=16", "activations=int8:tensor:sym")),
        ("BertForSequenceClassification", ("methods.zeroquant.word_embeddings=float", "rules={'*.0.*': float}")),
        ("BertForMaskedLM", ()),
        ("BertForMaskedLM", ("methods.zeroquant.word_embeddings=float",)),
        ("BertModel", ()),
        ("RobertaForSequenceClassification", ()),
        ("RobertaForMaskedLM", ()),
    ],
)
def test_a_dry_run_tells_the_size_and_touches_nothing(
    architecture: str,
    sets: tuple[str, ...],
    desk: Path,
    shelf: Any,
    qtool_command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = shelf.make(architecture, architecture)
    arguments = ["quantize", model, "--method", "zeroquant", *(part for pair in sets for part in ("--set", pair))]
    before = files(model)
    static = any("tensor" in pair for pair in sets)  # then a block is timed, on weights that are there
    with nullcontext() if static else headers_only(monkeypatch):
        ended = qtool_command(*arguments, "--dry-run", "--json", "-")
        assert ended.code == 0, ended.err
        table = qtool_command(*arguments, "--dry-run")
        assert table.code == 0
    assert files(model) == before
    assert list(desk.iterdir()) == []
    plan = json.loads(ended.out)
    assert plan["schema_version"] == 1
    assert qtool_command(*arguments, "-o", "out").code == 0
    real = Path("out/model.safetensors").stat().st_size
    assert abs(plan["size_bytes"] - real) <= 0.01 * real
    assert plan["source_bytes"] == (model / "model.safetensors").stat().st_size
    config = json.loads(Path("out/config.json").read_text())["quantization_config"]
    assert plan["quantized"] == config["modules"]
    assert plan["kept_float"] == json.loads(Path("out/qtool.json").read_text())["kept_float"]
    for path in [*plan["quantized"], *plan["kept_float"], *plan["kept_float"].values()]:
        assert path in table.out
    assert "nothing was written" in table.out


# --- a large model keeps its shards


def test_a_model_beyond_the_file_limit_keeps_shards_under_an_index(
    tiny: Any, desk: Path, zoo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    completed(quantize_events(str(tiny.model), recipe_of(tiny), Path("whole")))
    assemble = artifact.assemble
    monkeypatch.setattr(artifact, "assemble", lambda shards, folder: assemble(shards, folder, max_file_bytes=10_000))
    completed(quantize_events(str(tiny.model), recipe_of(tiny), Path("sharded")))
    names = sorted(path.name for path in Path("sharded").glob("*.safetensors"))
    assert names == [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    texts = zoo.sentences(5)
    whole = load_file(Path("whole") / "model.safetensors")
    shards = {name: value for part in names for name, value in load_file(Path("sharded") / part).items()}
    assert set(whole) == set(shards) and all(torch.equal(whole[name], shards[name]) for name in whole)
    # Not bit for bit: where a float tensor lies in a mapped file may decide how its products are rounded.
    found = zoo.plain(Path("sharded"), texts)
    assert torch.allclose(found, zoo.plain(Path("whole"), texts), rtol=0, atol=1e-5)
    assert artifact.damaged_tensors(Path("sharded")) == []
    whole, sharded = (json.loads(Path(name, "config.json").read_text()) for name in ("whole", "sharded"))
    assert whole == sharded


# --- the golden check


def test_a_model_that_does_not_reload_to_the_same_numbers_is_not_published(
    tiny: Any, desk: Path, qtool_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    assemble = artifact.assemble

    def damaging(shards: Any, folder: Path) -> Any:
        manifest = assemble(shards, folder)
        file = folder / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 64  # in the codes of some weight matrix: int8 comes last
        file.write_bytes(data)
        return manifest

    arguments = ("quantize", tiny.model, "--method", "zeroquant", "-o", "out")
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "assemble", damaging)
        ended = qtool_command(*arguments)
    assert ended.code == 1
    assert len(ended.errors) == 1
    assert not Path("out").exists()
    assert run_folders(desk) == ["out.qtool-run"]
    ended = qtool_command(*arguments, "--resume")
    assert ended.code == 0, ended.err
    assert run_folders(desk) == []


def test_the_golden_check_runs_in_a_fresh_process_and_names_what_differs(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the fixture that keeps golden checks in this process. (Killed processes, below, see the good outcome.)"""
    monkeypatch.chdir(tmp_path)
    check = pipeline._check_in_fresh_process

    def wrong(run: RunDirectory, inputs: Any, outputs: Any) -> None:
        off = {name: value + 1e-6 for name, value in outputs.items()}
        with pytest.raises(QtoolError, match=r"golden check in a fresh process.*: logits: differs by up to"):
            check(run, inputs, off)
        raise QtoolError("checked")

    monkeypatch.setattr(pipeline, "_check_in_fresh_process", wrong)
    with pytest.raises(QtoolError, match="checked"):
        completed(quantize_events(str(tiny.model), recipe_of(tiny), Path("out")))


def test_the_recorded_golden_batch_is_what_plain_transformers_computes(tiny: Any, desk: Path) -> None:
    completed(quantize_events(str(tiny.model), recipe_of(tiny), Path("out")))
    golden = json.loads(Path("out/qtool.json").read_text())["golden"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained("out").eval()
    with torch.no_grad(), one_by_one():
        logits = model(**{name: torch.tensor(value) for name, value in golden["inputs"].items()}).logits
    assert golden["outputs"]["logits"]["shape"] == list(logits.shape)
    assert golden["outputs"]["logits"]["first"] == logits.flatten()[:8].tolist()
    assert golden["outputs"]["logits"]["sha256"] == hashlib.sha256(logits.numpy().tobytes()).hexdigest()


# --- interruption and resumption, in this process


@pytest.fixture(scope="module")
def whole(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All files of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(pipeline, "_check_in_fresh_process", lambda *args: None)
        completed(quantize_events(str(tiny.model), recipe_of(tiny), Path("out")))
    return files(folder / "out")


def test_stopping_after_any_event_is_resumable(tiny: Any, desk: Path, whole: dict[str, bytes]) -> None:
    total = len(completed(quantize_events(str(tiny.model), recipe_of(tiny), Path("out"))))
    for stop in range(1, total):
        out = Path(f"out{stop}")
        events = quantize_events(str(tiny.model), recipe_of(tiny), out)
        for _ in range(stop):
            next(events)
        events.close()
        assert beside(out, "run").is_dir() == (stop > 1)
        completed(quantize_events(str(tiny.model), recipe_of(tiny), out, resume=True))
        assert files(out) == whole, f"stopped after event {stop}"
    assert run_folders(desk) == []


def stopped(tiny: Any, out: str, *, events: int = 10, **options: Any) -> None:
    """A run that ends after a number of events: by then two units are done."""
    running = quantize_events(str(tiny.model), recipe_of(tiny), Path(out), **options)
    for _ in range(events):
        next(running)
    running.close()


def test_finished_units_are_not_made_again(tiny: Any, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(tiny, "out", events=12)
    finished = sorted(path.name for path in beside(Path("out"), "run").glob("*.safetensors"))
    assert finished == ["block.0.safetensors", "embeddings.safetensors", "statistics.safetensors"]
    made: list[str] = []
    write = lowering._write_unit

    def noted(job: Any, unit: Any, *rest: Any) -> None:
        made.append(unit.name)
        write(job, unit, *rest)

    monkeypatch.setattr(lowering, "_write_unit", noted)
    monkeypatch.setattr(pipeline, "calibrate", lambda *args: pytest.fail("calibrated again"))
    completed(quantize_events(str(tiny.model), recipe_of(tiny), Path("out"), resume=True))
    assert made == ["block.1", "head"]


def test_a_run_directory_without_a_choice_is_an_error(tiny: Any, desk: Path) -> None:
    stopped(tiny, "out")
    with pytest.raises(InputError, match=r"out\.qtool-run holds an unfinished run; continue it with --resume or"):
        completed(quantize_events(str(tiny.model), recipe_of(tiny), Path("out")))
    completed(quantize_events(str(tiny.model), recipe_of(tiny), Path("out"), overwrite=True))


def test_resuming_something_else_names_what_differs(tiny: Any, desk: Path, shelf: Any) -> None:
    stopped(tiny, "out")

    def refused(model: Path, recipe: Any) -> str:
        with pytest.raises(InputError) as caught:
            completed(quantize_events(str(model), recipe, Path("out"), resume=True))
        return str(caught.value)

    other = shelf.make("another-one", seed=4, labels=("negative", "positive"))
    assert "started with a different model;" in refused(other, recipe_of(tiny))
    assert "started with a different recipe;" in refused(
        tiny.model, recipe_of(tiny, "zeroquant-w8a8-static", "weights.group_size=16")
    )
    assert "started with a different recipe, seed;" in refused(
        tiny.model, recipe_of(tiny, "zeroquant-w8a8-static", "seed=1")
    )
    assert "started with a different data, recipe;" in refused(
        tiny.model, recipe_of(tiny, "zeroquant-w8a8-static", "calibration.num_samples=9")
    )
    completed(quantize_events(str(tiny.model), recipe_of(tiny), Path("out"), resume=True))


def test_resume_adopts_the_recorded_threads(tiny: Any, desk: Path) -> None:
    recipe = recipe_of(tiny, "zeroquant-w8a8-static", "threads=1")
    completed(quantize_events(str(tiny.model), recipe, Path("one")))
    running = quantize_events(str(tiny.model), recipe, Path("two"))
    for _ in range(10):
        next(running)
    running.close()
    torch.set_num_threads(2)
    completed(quantize_events(str(tiny.model), recipe_of(tiny), Path("two"), resume=True))
    assert torch.get_num_threads() == 1
    assert json.loads(Path("two/qtool.json").read_text())["fingerprint"]["threads"] == 1
    assert deciding(Path("one")) == deciding(Path("two"))


def test_resuming_what_is_finished_does_nothing(tiny: Any, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    completed(quantize_events(str(tiny.model), recipe_of(tiny), Path("out")))
    before = files(Path("out"))
    monkeypatch.setattr(pipeline, "lower_all", lambda *args: pytest.fail("quantized again"))
    events = completed(quantize_events(str(tiny.model), recipe_of(tiny), Path("out"), resume=True))
    assert any("already published" in getattr(event, "message", "") for event in events)
    assert files(Path("out")) == before
    assert run_folders(desk) == []


def test_overwrite_repairs_a_damaged_output(tiny: Any, desk: Path, whole: dict[str, bytes]) -> None:
    completed(quantize_events(str(tiny.model), recipe_of(tiny), Path("out")))
    Path("out/model.safetensors").write_bytes(b"damaged")
    completed(quantize_events(str(tiny.model), recipe_of(tiny), Path("out"), overwrite=True))
    assert files(Path("out")) == whole


def test_an_interrupted_overwrite_keeps_the_old_output_until_it_is_done(
    tiny: Any, desk: Path, whole: dict[str, bytes]
) -> None:
    completed(quantize_events(str(tiny.model), recipe_of(tiny, "zeroquant-w8a8"), Path("out")))
    before = files(Path("out"))
    stopped(tiny, "out", overwrite=True)
    assert files(Path("out")) == before
    completed(quantize_events(str(tiny.model), recipe_of(tiny), Path("out"), resume=True))
    assert files(Path("out")) == whole
    assert run_folders(desk) == []


def test_a_truncated_shard_is_noticed(tiny: Any, desk: Path) -> None:
    stopped(tiny, "out", events=12)
    shard = beside(Path("out"), "run") / "block.0.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"block\.0\.safetensors cannot be read"):
        completed(quantize_events(str(tiny.model), recipe_of(tiny), Path("out"), resume=True))


def test_the_fingerprint_covers_what_decides_the_bytes(tiny: Any) -> None:
    job = open_job(str(tiny.model), recipe_of(tiny))
    found = job.fingerprint(calibration_batches(job))
    assert set(found) == {
        "model", "data", "recipe", "seed", "threads", "instruction set", "versions", "statistics",
    }  # fmt: skip
    assert set(found["versions"]) >= {"qtool", "torch", "transformers", "tokenizers", "safetensors"}
    assert found["versions"]["qtool"] == qtool.__version__
    assert json.loads(json.dumps(found)) == found


# --- killed processes


class Running:
    """A real `python -m qtool quantize` process, to be stopped at some moment."""

    def __init__(self, model: Path, out: Path, *arguments: str) -> None:
        self.out = out
        command = [sys.executable, "-m", "qtool", "quantize", str(model), "-o", str(out), "-q", *arguments]
        self.process = subprocess.Popen(
            command, cwd=out.parent, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def wait_for(self, path: Path | None, delay: float = 0.0, limit: float = 240.0) -> None:
        """Until `path` exists (or the process has ended), and then `delay` seconds more."""
        ends = time.monotonic() + limit
        while path is not None and not path.exists() and self.process.poll() is None:
            assert time.monotonic() < ends, f"{path} never appeared"
            time.sleep(0.001)
        try:
            self.process.wait(delay)
        except subprocess.TimeoutExpired:
            return

    def stop(self, number: signal.Signals) -> tuple[int, list[str]]:
        """The exit status, and what was said on stderr."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        _, said = self.process.communicate(timeout=240)
        return self.process.returncode, [line for line in said.splitlines() if line.strip()]

    def end(self) -> None:
        """Lets it run to its end, which must be a good one."""
        _, said = self.process.communicate(timeout=240)
        assert (self.process.returncode, said) == (0, "")


def test_signals_and_kills_are_resumable(tiny: Any, tmp_path: Path, whole: dict[str, bytes]) -> None:
    """One output, stopped again and again at ever later moments by SIGTERM, SIGINT and SIGKILL, then finished."""
    out = tmp_path / "out"
    run = beside(out, "run")
    arguments = ("-c", "zeroquant-w8a8-static", "--task", "sst2", "--data", str(tiny.data))
    draw = random.Random(8)
    # With --resume from the start: without a run it starts one.
    moments = [
        (signal.SIGTERM, run / "run.json", 0.0),
        (signal.SIGKILL, None, draw.uniform(1, 5)),
        (signal.SIGINT, run / "publish", 0.05),
        (signal.SIGKILL, run / "publish", draw.uniform(0, 0.5)),
        (signal.SIGKILL, run / "golden.safetensors", draw.uniform(0, 2)),
        (signal.SIGKILL, out, 0.0),
    ]
    said = {
        signal.SIGTERM: (
            143,
            [f"qtool: terminated; {RESUMABLE}"],
        ),
        signal.SIGINT: (
            130,
            [f"qtool: interrupted; {RESUMABLE}"],
        ),
        signal.SIGKILL: (-9, []),
    }
    for number, path, delay in moments:
        running = Running(tiny.model, out, *arguments, "--resume")
        shutil.rmtree(run / "publish", ignore_errors=True)  # of the process before: the new one makes its own
        (run / "golden.safetensors").unlink(missing_ok=True)
        running.wait_for(path, delay)
        ended = running.stop(number)
        assert ended in (said[number], (0, [])), (number, path)
        if ended == (0, []) and path != out:  # it was faster than the signal, as it may be on a busy machine
            assert files(out) == whole
            shutil.rmtree(out)
            continue
        assert run.is_dir() or out.is_dir() or path is None
        assert not out.is_dir() or files(out) == whole, "something half-written is at the output's place"
    running = Running(tiny.model, out, *arguments, "--resume")
    running.end()
    assert files(out) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "qtool-out"]
    assert (tmp_path / "qtool-out" / "latest").read_text() == f"{out}\n"


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("overwrite", [False, True])
def test_kills_of_a_real_model(
    overwrite: bool, test_models: Callable[[str], Path], shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    """`kill -9` in ever later units, half of them while publishing; the bytes are those of an uninterrupted run."""
    model = test_models("minilm-sst2")
    arguments = ("-c", "zeroquant-w8a8-static", "--task", "sst2", "--data", str(shared_data("sst2")))
    expected = tmp_path / "expected"
    Running(model, expected, *arguments).end()
    out = tmp_path / "out"
    run = beside(out, "run")
    if overwrite:
        shutil.copytree(expected, out)
        (out / "model.safetensors").write_bytes(b"an older model")
    draw = random.Random(10)
    units = [
        "run.json",
        "statistics.safetensors",
        "embeddings.safetensors",
        "block.1.safetensors",
        "block.4.safetensors",
    ]
    places = [units[1], units[3], "publish", "publish"] if overwrite else [*units, *["publish"] * 5]
    for number, name in enumerate(places):
        options = ("--overwrite",) if overwrite and number == 0 else ("--resume",)
        running = Running(model, out, *arguments, *options)
        shutil.rmtree(run / "publish", ignore_errors=True)  # of the process before: the new one makes its own
        running.wait_for(run / name, draw.uniform(0, 0.3))
        assert running.stop(signal.SIGKILL)[0] == -9
        assert out.is_dir() or beside(out, "old").is_dir() or not overwrite
    Running(model, out, *arguments, "--resume").end()
    assert files(out) == files(expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out", "qtool-out"]
