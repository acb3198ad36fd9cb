"""`--device cuda` on an emulated GPU: calibrating and quantizing give what they give on the CPU."""

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_cuda import emulated_cuda
from small_models import ATTENDING, DATA, golden_check_here, save
from torch.nn.attention import SDPBackend, sdpa_kernel

import qtool
from qtool import pipeline, spill
from qtool.api import calibrate_events, calibration_batches, open_job, resolve_recipe
from qtool.calibrate.observers import OBSERVERS
from qtool.errors import InputError
from qtool.inspection import inspect
from qtool.spill import SpilledStates
from qtool.stream import Stream

BERT, LLAMA = "BertForSequenceClassification", "LlamaForCausalLM"
LEARNING = ("methods.zeroquant.lkd.enabled=true", "methods.zeroquant.lkd.steps=4", "calibration.batch_size=2")
CAREFUL = ("weights.spec=int4:group:16:sym", "activations.spec=float", "weights.rounding=gptq")
GPU_NAME = " + Emulated GPU 9.0 CUDA 13.0"


def quantized(folder: Path, device: str, source: Path, *methods: str, sets: tuple[str, ...] = ()) -> Path:
    with golden_check_here(folder):
        options: dict[str, Any] = {"method": methods, "set": (*DATA, *sets), "output": folder / device}
        return qtool.quantize(str(source), device=device, **options).path


def on_both(folder: Path, architecture: str, *methods: str, sets: tuple[str, ...] = ()) -> tuple[Path, Path]:
    """What methods make of a small model on the CPU and on the GPU."""
    source = save(folder / "float", architecture, **ATTENDING[architecture])
    cpu = quantized(folder, "cpu", source, *methods, sets=sets)
    with emulated_cuda() as gpu:
        cuda = quantized(folder, "cuda", source, *methods, sets=sets)
        assert gpu.operations > 100
    assert weights(cpu) == weights(cuda)
    return cpu, cuda


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def report(folder: Path) -> Any:
    return json.loads((folder / "qtool.json").read_text())


def drained(events: Any) -> Any:
    """The result of a generator of events."""
    while True:
        try:
            next(events)
        except StopIteration as done:
            return done.value


@pytest.mark.parametrize("correction", ["float", "quantized"])
def test_ibert_is_the_same_artifact(tmp_path: Path, correction: str) -> None:
    cpu, cuda = on_both(tmp_path, BERT, "ibert", sets=(f"methods.ibert.bias_correction={correction}",))
    assert (cpu / "config.json").read_bytes() == (cuda / "config.json").read_bytes()
    here, there = report(cpu), report(cuda)
    assert here["figures"] == there["figures"] and here["golden"] == there["golden"]
    assert there["fingerprint"]["instruction set"] == here["fingerprint"]["instruction set"] + GPU_NAME
    assert inspect(cuda, verify=True)["checks"]["golden batch"] == "agrees"


@pytest.mark.parametrize(
    ("architecture", "sets"),
    [
        (BERT, LEARNING),
        (BERT, CAREFUL),
        (LLAMA, (*CAREFUL, "methods.zeroquant.token_weights=sensitivity")),
        (LLAMA, ("weights.rounding=gpfq", "methods.zeroquant.attention=int8", *LEARNING)),
        ("GPT2LMHeadModel", ("methods.zeroquant.smoothing=0.5", "activations.spec=int8:tensor:sym")),
    ],
    ids=["lkd", "gptq", "sensitivity", "gpfq", "smoothing"],
)
def test_zeroquant_is_the_same_artifact(
    tmp_path: Path, architecture: str, sets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients go through attention that is taken apart on a GPU; here on the CPU too, which rounds them alike."""
    monkeypatch.setattr(Stream, "_repeatable", lambda stream: apart() if torch.is_grad_enabled() else nullcontext())
    cpu, cuda = on_both(tmp_path, architecture, "zeroquant", sets=sets)
    figures = report(cpu)["figures"]
    assert figures == report(cuda)["figures"]
    learned = [found for found in figures.values() if "lkd_after" in found]
    assert any(found["lkd_after"] < found["lkd_before"] for found in learned) == ("lkd" in str(sets))


def apart() -> AbstractContextManager[Any]:
    return sdpa_kernel(SDPBackend.MATH)


def test_attention_is_taken_apart_for_gradients_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused attention adds up gradients in any order there, so that the same run would give other bytes."""
    fused: list[tuple[str, bool]] = []

    def attend(query: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        flags = torch.backends.cuda
        fused.append((query.device.type, flags.mem_efficient_sdp_enabled() or flags.flash_sdp_enabled()))
        assert torch.is_grad_enabled() or fused[-1][1]
        return real(query, *args, **options)

    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    source = save(tmp_path / "float", BERT)
    quantized(tmp_path, "cpu", source, "zeroquant", sets=LEARNING)
    assert set(fused) == {("cpu", True)}
    with emulated_cuda():
        quantized(tmp_path, "cuda", source, "zeroquant", sets=LEARNING)
    assert {("cuda", False), ("cuda", True)} <= set(fused)


def test_attention_codes_are_the_same_artifact(tmp_path: Path) -> None:
    on_both(tmp_path, BERT, "zeroquant", "logattn")


def test_a_zeroquant_artifact_that_a_gpu_made_is_checked_to_the_bit_on_its_cpu(tmp_path: Path) -> None:
    """Golden outputs are the CPU's: what they are compared with does not depend on the GPU."""
    with emulated_cuda():
        made = quantized(tmp_path, "cuda", save(tmp_path / "float", BERT), "zeroquant")
    assert inspect(made, verify=True)["checks"]["golden batch"] == "agrees"
    body = report(made)
    first = next(iter(body["golden"]["outputs"].values()))
    first["sha256"] = first["sha256"][::-1]  # a last bit, say; elsewhere `GROSS` would let it pass
    (made / "qtool.json").write_text(json.dumps(body))
    assert "differs" in inspect(made, verify=True)["checks"]["golden batch"]


@pytest.mark.parametrize("name", OBSERVERS)
def test_observers_see_what_they_see_on_the_cpu(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    attends = name.startswith("attention")
    batches = [3.0**i * torch.randn((7, 2, 5) if attends else (7, 6), generator=generator) for i in range(3)]
    batches = [batch.softmax(-1) for batch in batches] if attends else batches
    here, there = OBSERVERS[name](), OBSERVERS[name]()
    for rows in batches:
        here.update(rows)
    with emulated_cuda():
        for rows in batches:
            there.update(rows.to("cuda"))
        found = {key: value.cpu() for key, value in there.state().items()}
    assert found.keys() == here.state().keys()
    assert all(torch.equal(found[key], value) for key, value in here.state().items())


@pytest.mark.parametrize("spilled", [False, True])
def test_hidden_states_wait_on_the_host(tmp_path: Path, spilled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that wait on disk: a GPU holds a unit and a batch."""
    kept: list[Any] = []

    class Seen(SpilledStates):
        def insert(self, index: int, state: Any) -> None:
            super().insert(index, state)
            kept.append(self[index])

    monkeypatch.setattr(spill, "_LEAST", 1)
    source = save(tmp_path / "float", BERT)
    with emulated_cuda():
        job = open_job(str(source), resolve_recipe(methods=["ibert"], sets=DATA, model=str(source)), "cuda")
        drained(pipeline.calibrate(job, calibration_batches(job), lambda: Seen(tmp_path) if spilled else kept))
    hidden, calls = kept[0]
    every = [hidden, *(one for call in calls for one in (*call.args, *call.kwargs.values()))]
    assert len(kept) == 1 and {x.device.type for x in every if isinstance(x, torch.Tensor)} == {"cpu"}


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "BertForMaskedLM"])
def test_a_model_writes_the_same_text(zoo: Any, architecture: str) -> None:
    model = (zoo.make if "Masked" in architecture else zoo.causal)("float", architecture)
    sets = ("calibration.source=self", "calibration.num_samples=4", "calibration.max_length=12")

    def written(device: str) -> list[Any]:
        job = open_job(str(model), resolve_recipe(config="zeroquant-w8a8-static", sets=sets), device)
        return [batch["input_ids"].tolist() for batch in calibration_batches(job).batches]

    wanted = written("cpu")
    with emulated_cuda() as gpu:
        assert written("cuda") == wanted and gpu.operations > 100


def test_statistics_are_the_hosts_and_fingerprints_name_the_gpu(tmp_path: Path) -> None:
    source = save(tmp_path / "float", BERT)
    options: dict[str, Any] = {"method": "ibert", "set": DATA}
    recipe = resolve_recipe(methods=["ibert"], sets=DATA, model=str(source))
    with emulated_cuda():
        drained(calibrate_events(str(source), recipe, tmp_path / "statistics", device="cuda"))
    with golden_check_here(tmp_path):
        found = qtool.quantize(str(source), output=tmp_path / "a", statistics=tmp_path / "statistics", **options).path
        wanted = qtool.quantize(str(source), output=tmp_path / "b", **options).path
    assert weights(found) == weights(wanted)
    with emulated_cuda(), pytest.raises(InputError, match="not empty"):  # it is not what such a run would leave
        qtool.quantize(str(source), output=wanted, resume=True, device="cuda", **options)
