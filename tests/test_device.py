"""`--device cuda`: the pipeline on an emulated GPU, against the CPU's."""

from pathlib import Path
from typing import Any

import torch
from emulated_cuda import emulated_cuda
from small_models import DATA, golden_check_here, load, save
from safetensors.torch import load_file

import qtool


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def both(folder: Path, architecture: str, *methods: str, sets: tuple[str, ...] = (), **options: Any) -> tuple[Path, Path]:
    source = save(folder / "float", architecture, **options)
    found = []
    for device in ("cpu", "cuda"):
        with golden_check_here(folder):
            choices: dict[str, Any] = {"method": methods, "set": (*DATA, *sets), "output": folder / device}
            if device == "cpu":
                qtool.quantize(str(source), **choices)
            else:
                with emulated_cuda():
                    qtool.quantize(str(source), device="cuda", **choices)
        found.append(folder / device)
    return found[0], found[1]


def test_ibert(tmp_path: Path) -> None:
    cpu, cuda = both(tmp_path, "BertForSequenceClassification", "ibert", sets=("methods.ibert.bias_correction=quantized",))
    a, b = tensors(cpu), tensors(cuda)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
