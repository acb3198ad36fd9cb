"""`--device cuda` on an emulated GPU: the same pipeline, the same numbers, and nothing where devices would mix."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emulated_cuda import GPU, emulated_cuda
from safetensors.torch import load_file
from small_models import ATTENDING, DATA, golden_check_here, save

import qtool
from qtool.calibrate.observers import OBSERVERS
from qtool.inspection import inspect

BERT, LLAMA = "BertForSequenceClassification", "LlamaForCausalLM"
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
LEARNING = ("methods.zeroquant.lkd.enabled=true", "methods.zeroquant.lkd.steps=4", "calibration.batch_size=2")
CAREFUL = ("weights.spec=int4:group:16:sym", "activations.spec=float", "weights.rounding=gptq")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


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
    return cpu, cuda


# The emulation itself


def test_the_emulated_gpu_refuses_what_a_gpu_refuses() -> None:
    with emulated_cuda():
        x, whole = torch.ones(3, 4, device="cuda"), torch.ones(2, 2, dtype=torch.int32, device="cuda")
        assert x.device == GPU and x.is_cuda and type(x.cpu()) is torch.Tensor
        mixed: list[Callable[[], Any]] = [
            lambda: x + torch.ones(4),
            lambda: torch.cat([x, torch.ones(3, 4)]),
            lambda: x @ torch.ones(4, 2),
            lambda: torch.zeros(3, 4).add_(x),
            lambda: torch.zeros(()).add_(x.sum()),
            lambda: torch.ldexp(x, torch.tensor(3)),
            lambda: torch.nn.functional.embedding(torch.tensor([0]), x),
            lambda: torch.equal(x, torch.ones(3, 4)),
        ]
        for operation in mixed:
            with pytest.raises(RuntimeError, match="same device"):
                operation()
        with pytest.raises(RuntimeError, match="indices should be"):
            torch.ones(3)[torch.tensor([0], device="cuda")]
        for read in (x.numpy, lambda: np.asarray(x)):
            with pytest.raises(TypeError, match="cuda:0 device type tensor to numpy"):
                read()
        with pytest.raises(NotImplementedError, match="\"addmm_cuda\" not implemented for 'Int'"):
            whole @ whole
        with pytest.raises(RuntimeError, match="'cuda' device type for generator"):
            torch.randn(2, device="cuda", generator=torch.Generator())
        assert (x + torch.ones(())).device == GPU and x.sum().item() == 12.0
        assert x[torch.tensor([True, False, True])].shape == (2, 4)  # CUDA fetches indices
    assert not torch.cuda.is_available()


def test_gradients_go_through_the_emulated_gpu() -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(4, 3), torch.randn(5, 4)
    layer(x).square().sum().backward()
    assert layer.weight.grad is not None
    wanted = layer.weight.grad.clone()
    with emulated_cuda():
        moved = torch.nn.Linear(4, 3)
        moved.load_state_dict(layer.state_dict())
        moved.to("cuda")
        assert isinstance(moved.weight, torch.nn.Parameter) and moved.weight.device == GPU
        moved(x.to("cuda")).square().sum().backward()
        assert moved.weight.grad is not None and moved.weight.grad.device == GPU
        assert torch.equal(moved.weight.grad.cpu(), wanted)


@pytest.mark.parametrize("name", OBSERVERS)
def test_observers_see_on_the_gpu_what_they_see_on_the_cpu(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (7, 2, 5) if name.startswith("attention") else (7, 6)
    batches = [3.0**i * torch.randn(shape, generator=generator) for i in range(3)]
    batches = [b.softmax(-1) for b in batches] if name.startswith("attention") else batches
    here, there = OBSERVERS[name](), OBSERVERS[name]()
    for rows in batches:
        here.update(rows)
    with emulated_cuda():
        for rows in batches:
            there.update(rows.to("cuda"))
        found = {key: value.cpu() for key, value in there.state().items()}
    assert found.keys() == here.state().keys()
    assert all(torch.equal(found[key], value) for key, value in here.state().items())


# Quantizing


@pytest.mark.parametrize("correction", ["float", "quantized"])
def test_ibert_is_the_same_artifact(tmp_path: Path, correction: str) -> None:
    cpu, cuda = on_both(tmp_path, BERT, "ibert", sets=(f"methods.ibert.bias_correction={correction}",))
    assert (cpu / "model.safetensors").read_bytes() == (cuda / "model.safetensors").read_bytes()
    assert (cpu / "config.json").read_bytes() == (cuda / "config.json").read_bytes()
    made = json.loads((cuda / "qtool.json").read_text())
    own = json.loads((cpu / "qtool.json").read_text())
    assert made["figures"] == own["figures"] and made["golden"] == own["golden"]
    assert (
        made["fingerprint"]["instruction set"]
        == f"{own['fingerprint']['instruction set']} + Emulated GPU 9.0 CUDA 13.0"
    )
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
def test_zeroquant_is_the_same_artifact(tmp_path: Path, architecture: str, sets: tuple[str, ...]) -> None:
    cpu, cuda = on_both(tmp_path, architecture, "zeroquant", sets=sets)
    assert (cpu / "model.safetensors").read_bytes() == (cuda / "model.safetensors").read_bytes()


def test_attention_codes_are_the_same_artifact(tmp_path: Path) -> None:
    cpu, cuda = on_both(tmp_path, BERT, "zeroquant", "logattn")
    assert (cpu / "model.safetensors").read_bytes() == (cuda / "model.safetensors").read_bytes()
