"""The Triton kernels, interpreted, on tensors that say that they are on a GPU: with none at hand, the way there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_cuda import GPU, emulated_cuda
from small_models import DATA, Artifacts, batch, golden_check_here, load, outputs, save

import qtool
from qtool import kernels
from qtool.nn.integer.gpu import GpuPlan

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one")


def test_a_model_on_cuda_runs_on_the_kernels(tmp_path: Path) -> None:
    source = save(tmp_path / "float", "BertForSequenceClassification")
    with golden_check_here(tmp_path):
        folder = qtool.quantize(str(source), method="ibert", set=DATA, output=tmp_path / "out").path
    model, texts = load(folder), batch()
    wanted = outputs(model, texts)
    with emulated_cuda(None):
        assert kernels.backend(GPU).name == "triton" and kernels.backend().name != "triton"
        model.to("cuda")
        assert torch.equal(outputs(model, {name: x.to("cuda") for name, x in texts.items()}).cpu(), wanted)
        assert isinstance(vars(model.bert.embeddings)["_plan"], GpuPlan)
        model.to("cpu")
    assert torch.equal(outputs(model, texts), wanted)


def test_quantizing_on_the_kernels_gives_the_same_artifact(tmp_path: Path) -> None:
    correction = "methods.ibert.bias_correction=quantized"  # which reads what lowered blocks compute
    source = save(tmp_path / "float", "BertForSequenceClassification")
    options: dict[str, Any] = {"method": "ibert", "set": (*DATA, correction)}
    with golden_check_here(tmp_path):
        cpu = qtool.quantize(str(source), output=tmp_path / "cpu", **options).path
        with emulated_cuda(None) as gpu:
            cuda = qtool.quantize(str(source), output=tmp_path / "cuda", device="cuda", **options).path
            assert gpu.operations > 100
    assert (cpu / "model.safetensors").read_bytes() == (cuda / "model.safetensors").read_bytes()


def test_float_models_on_cuda_run_on_the_kernels(tmp_path: Path) -> None:
    """Float rows by codes: within rounding of the CPU, for texts and for a token at a time."""
    sets = "weights=int4:group:16:min", "activations=float"
    model = load(Artifacts(tmp_path, "emulated").make("LlamaForCausalLM", ("zeroquant",), *sets))
    texts = [batch(), {name: x[:2, :1] for name, x in batch().items()}]
    with kernels.using("reference"):
        wanted = [outputs(model, given) for given in texts]
    with emulated_cuda(None):
        model.to("cuda")
        for given, logits in zip(texts, wanted, strict=True):
            found = outputs(model, {name: x.to("cuda") for name, x in given.items()}).cpu()
            assert (found - logits).norm() <= 1e-5 * logits.norm()
