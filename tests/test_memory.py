"""Budgets: what a limit changes, what it never changes, and what is refused before any work."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from qtool import memory, pipeline
from qtool.api import calibration_batches, divided_batches, open_job, quantize_events, resolve_recipe
from qtool.errors import UnavailableError
from qtool.job import Job
from qtool.memory import FIXED, Budget, Need, divide, needs, shapes_of
from qtool.spill import SpilledStates

Command = Callable[..., Any]
STATIC, DYNAMIC = "zeroquant-w8a8-static", "zeroquant-w8a8"
SHAPES = [(32, 20), (28, 24)]


def job_of(tiny: Any, config: str = STATIC, *sets: str) -> Job:
    return open_job(str(tiny.model), resolve_recipe(config=config, sets=sets, model=str(tiny.model)))


def worst(found: list[Need], step: str) -> int:
    return max(need.num_bytes for need in found if need.step == step)


def deciding(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("model.safetensors", "config.json")]


# --- what is needed


def test_every_unit_has_a_need_and_every_step(tiny: Any) -> None:
    job = job_of(tiny)
    found = needs(job, SHAPES, calibrates=True, spill=False)
    names = [unit.name for unit in job.anatomy.units]
    assert [need.unit for need in found if need.step == "quantize"] == names
    assert [need.unit for need in found if need.step == "golden check"] == names
    assert [need.unit for need in found if need.step == "calibrate"] == names[:-1], "nobody observes the head"


@pytest.mark.parametrize(("config", "calibrates"), [(DYNAMIC, True), (STATIC, False)])
def test_without_a_pass_over_the_data_they_take_nothing(tiny: Any, config: str, calibrates: bool) -> None:
    job = job_of(tiny, config)
    few, many = (needs(job, [(2, 4)] * n, calibrates=calibrates, spill=False) for n in (1, 1000))
    assert few == many and "calibrate" not in {need.step for need in few}


def test_states_count_until_they_lie_on_disk(tiny: Any) -> None:
    """4 bytes for each token and channel, and as much for each pair of tokens, which masks are about."""
    job = job_of(tiny)
    kept, spilled = (worst(needs(job, SHAPES, calibrates=True, spill=spill), "calibrate") for spill in (False, True))
    assert kept - spilled == sum(4 * rows * tokens * (32 + tokens) for rows, tokens in SHAPES)


def test_codes_of_a_unit_count_and_mapped_floats_do_not(tiny: Any) -> None:
    """The source is float32, so that pass 1 reads the files themselves."""
    job = job_of(tiny)
    codes = memory.lowered_bytes(job)
    block = [m for path, m in job.plan.modules.items() if path.startswith("bert.encoder.layer.0.")]
    padded = sum(-(-m["shape"][0] // 16) * 16 * -(-m["shape"][1] // 4) * 4 for m in block)
    scales_and_biases = sum(4 * 2 * m["shape"][0] + 4 for m in block)
    assert codes["block.0"] == padded + scales_and_biases
    assert codes["head"] == 0
    passing = [need for need in needs(job, [(1, 1)], calibrates=True, spill=True) if need.step == "calibrate"]
    blocks = {need.num_bytes for need in passing if need.unit.startswith("block")}
    assert blocks == {FIXED + memory.pass_bytes(job, (1, 1))}, "no unit's floats are in memory"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_sources_are_widened_in_pass_1(zoo: Any, dtype: torch.dtype) -> None:
    folder = zoo.make("narrow", change=lambda model: model.to(dtype))
    job = open_job(str(folder), resolve_recipe(config=STATIC, model=str(folder)))
    found = {n.unit: n.num_bytes for n in needs(job, [(1, 1)], calibrates=True, spill=True) if n.step == "calibrate"}
    block = sum(t.numel() for name, t in job.model.state_dict().items() if job.anatomy.blocks[0].owns(name))
    inside = found["block.0"] - FIXED - memory.pass_bytes(job, (1, 1))
    assert inside == 4 * block


def test_methods_that_follow_need_both_models(tiny: Any) -> None:
    job = job_of(tiny, "ibert")
    found = needs(job, SHAPES, calibrates=False, spill=False)
    alone = needs(job, [(1, 1)], calibrates=False, spill=True)
    states = sum(4 * rows * tokens * (32 + tokens) for rows, tokens in SHAPES)
    assert worst(found, "quantize") - worst(alone, "quantize") > 2 * states


@pytest.mark.parametrize("way", ["methods.zeroquant.lkd=true", "methods.zeroquant.token_weights=sensitivity"])
def test_gradients_keep_what_a_block_computes(way: str, tiny: Any) -> None:
    """Beside what rounding with the same data needs: 20 values a token as wide as the widest layer, which has 48."""
    entries = ("weights=int4:group:16:sym", "weights.rounding=gptq")
    without, found = (
        [need for need in needs(job_of(tiny, "zeroquant-w8a8", *more), [(3, 5)], calibrates=False, spill=True)]
        for more in (entries, (*entries, way))
    )
    worst_of = [max(n.num_bytes for n in some if n.step == "quantize") for some in (without, found)]
    assert worst_of[1] - worst_of[0] >= 4 * 3 * 5 * 20 * 48


# --- how the work is divided


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes up what is needed: `each` a sequence of the largest batch, `states` of all unless on disk, `least`."""

    def make(each: int, states: int, least: int) -> None:
        def made_up(job: Any, shapes: Any, *, calibrates: bool, spill: bool) -> list[Need]:
            largest = max(rows for rows, _ in shapes)
            return [
                Need("quantize", "embeddings", least),
                Need("calibrate", "block.0", each * largest + (0 if spill else states)),
            ]

        monkeypatch.setattr(memory, "needs", made_up)

    return make


@pytest.mark.parametrize(
    ("limit", "budget"),
    [
        (10_000, Budget(32, False)),
        (4200, Budget(32, False)),
        (4199, Budget(32, True)),  # the same batches on disk come before smaller ones
        (3200, Budget(32, True)),
        (3199, Budget(16, False)),
        (1700, Budget(16, True)),
        (1100, Budget(8, True)),
    ],
)
def test_the_largest_batches_that_fit(tiny: Any, fits: Callable[..., None], limit: int, budget: Budget) -> None:
    job = job_of(tiny)
    batches = calibration_batches(job)
    fits(each=100, states=1000, least=900)
    assert divide(job, batches, limit, calibrates=True) == budget


def test_what_cannot_be_kept_is_refused_by_name(tiny: Any, fits: Callable[..., None]) -> None:
    job = job_of(tiny)
    batches = calibration_batches(job)
    fits(each=10**6, states=0, least=5 * 10**8 + 1)
    with pytest.raises(UnavailableError) as error:
        divide(job, batches, 10**8, calibrates=True)
    assert str(error.value) == (
        "max-memory of 100 MB cannot be kept: embeddings needs 501 MB (quantize); allow that much"
    )
    fits(each=6 * 10**8, states=0, least=10)
    with pytest.raises(UnavailableError, match=r"block\.0 needs 600 MB \(calibrate\).*--max-length"):
        divide(job, batches, 10**8, calibrates=True)


def test_what_the_message_asks_for_is_enough(tiny: Any) -> None:
    job = job_of(tiny)
    batches = calibration_batches(job)
    with pytest.raises(UnavailableError) as error:
        divide(job, batches, 1, calibrates=True)
    asked = int(str(error.value).split(" needs ")[1].split(" MB")[0].replace(",", ""))
    assert divide(job, batches, asked * 10**6, calibrates=True).batch_size >= 1


@pytest.mark.parametrize(("available", "spill"), [(10**12, False), (1, True)])
def test_without_a_limit_only_the_place_of_states_changes(
    tiny: Any, available: int, spill: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(tiny)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": available}))
    assert divide(job, calibration_batches(job), None, calibrates=True) == Budget(32, spill)


def test_smaller_batches_are_cut_and_recorded(tiny: Any, fits: Callable[..., None]) -> None:
    job = job_of(tiny, STATIC, "max_memory=1000", "calibration.num_samples=20")
    before = calibration_batches(job)
    fits(each=100, states=0, least=0)
    batches, budget = divided_batches(job, calibrates=True)
    assert budget.batch_size == 8 and shapes_of(batches)[0][0] == 8
    assert job.recipe.calibration.batch_size == 8, "the report says with which batches it was made"
    assert batches.digest != before.digest, "and a run does not go on with others"
    assert batches.num_tokens == before.num_tokens


# --- whole runs


def run(tiny: Any, out: str, config: str, *sets: str) -> list[Any]:
    recipe = resolve_recipe(
        config=config, sets=sets, model=str(tiny.model), flags={"task": "sst2", "data": tiny.data, "batch_size": 8}
    )
    return list(quantize_events(str(tiny.model), recipe, Path(out)))


@pytest.mark.parametrize("config", [STATIC, "ibert"])
def test_states_on_disk_change_no_byte(config: str, tiny: Any, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tiny, "plain", config)
    made: list[Path] = []

    def spilled(folder: Path) -> SpilledStates:
        made.append(folder)
        return SpilledStates(folder)

    monkeypatch.setattr(pipeline, "SpilledStates", spilled)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1}))
    events = run(tiny, "spilled", config)
    assert made and set(made) == {Path("spilled.qtool-run")}
    assert any("lie on disk" in getattr(event, "message", "") for event in events)
    assert deciding(Path("plain")) == deciding(Path("spilled"))
    assert not Path("spilled.qtool-run").exists()


def test_a_generous_limit_changes_no_byte(tiny: Any, desk: Path) -> None:
    run(tiny, "plain", STATIC)
    run(tiny, "bounded", STATIC, "max_memory=3GB")
    assert deciding(Path("plain")) == deciding(Path("bounded"))
    assert "max_memory" not in Path("bounded/README.md").read_text(), "a machine's memory is nobody else's matter"


@pytest.mark.parametrize("command", ["quantize", "dry run", "run", "calibrate"])
def test_a_limit_that_cannot_be_kept_ends_before_any_work(
    command: str, tiny: Any, desk: Path, qtool_command: Command
) -> None:
    recipe = {"methods": ["zeroquant"], "preset": STATIC, "model": {"name": str(tiny.model)}}
    recipe["evaluate"] = {"task": "sst2", "data": str(tiny.data)}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    lines = {
        "quantize": ("quantize", tiny.model, "-c", STATIC, "-o", "out"),
        "dry run": ("quantize", tiny.model, "-c", STATIC, "-o", "out", "--dry-run"),
        "run": ("run", "recipe.yaml", "-o", "out"),
        "calibrate": ("calibrate", tiny.model, "-c", STATIC, "-o", "out"),
    }
    ended = qtool_command(*lines[command], "--max-memory", "20MB", "-q")
    assert ended.code == 4 and len(ended.errors) == 1, ended.err
    assert ended.errors[0].startswith("max-memory of 20 MB cannot be kept: ")
    assert [path.name for path in desk.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("size", ["lots", "0", "-3GB", "3 GX", "", "1e9GB"])
def test_a_size_that_is_none(size: str, tiny: Any, desk: Path, qtool_command: Command) -> None:
    ended = qtool_command("quantize", tiny.model, "--method", "zeroquant", "--max-memory", size, "-o", "out")
    assert (ended.code, len(ended.errors)) == (3, 1)
    assert "max_memory" in ended.errors[0] and "3GB or 512MiB" in ended.errors[0]


def test_a_dry_run_tells_what_the_limit_bounds(tiny: Any, desk: Path, qtool_command: Command) -> None:
    line = ("quantize", tiny.model, "-c", STATIC, "--dry-run", "--json", "-")
    said = json.loads(qtool_command(*line).out)["anonymous_memory_bytes"]
    job = job_of(tiny)
    found = needs(job, shapes_of(calibration_batches(job)), calibrates=True, spill=False)
    assert said == max(need.num_bytes for need in found)
    assert qtool_command(*line, "--max-memory", str(said)).code == 0
