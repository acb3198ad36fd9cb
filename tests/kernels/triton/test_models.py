"""Integer models on the Triton kernels give the same logits, `==`, as on the CPU, joined and module by module."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import ENCODERS, Artifacts, batch, load, outputs

from qtool import kernels
from qtool.errors import InputError
from qtool.kernels.triton import launch
from qtool.nn.integer.gpu import GpuPlan
from qtool.nn.plan import one_by_one

RECIPES = {
    "default": (),
    "polynomial": ("methods.ibert.gelu=polynomial",),
    "centered": ("methods.ibert.gelu=polynomial", "methods.ibert.shifted_gelu=false", "methods.ibert.smoothing=null"),
    "static": ("activations=int8:tensor:sym",),
}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return Artifacts(tmp_path_factory.mktemp("models"), "gpu")


@contextmanager
def on_gpu(device: torch.device) -> Iterator[None]:
    """The backend is what a GPU has; where there is none, its kernels are interpreted."""
    if device.type == "cuda":
        yield
        return
    with kernels.using("triton"):
        yield


def agree(folder: Path, device: torch.device, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits that are the same on the CPU and on the GPU."""
    wanted = outputs(load(folder), inputs)
    model = load(folder).to(device)
    given = {name: value.to(device) for name, value in inputs.items()}
    with on_gpu(device):
        assert torch.equal(outputs(model, given).cpu(), wanted)
        assert isinstance(model.base_model.embeddings.__dict__["_plan"], GpuPlan)
        with one_by_one():
            assert torch.equal(outputs(model, given).cpu(), wanted)
    return wanted


@pytest.mark.parametrize("architecture", ENCODERS)
def test_every_family(artifacts: Artifacts, architecture: str, device: torch.device) -> None:
    assert agree(artifacts.make(architecture, ("ibert",)), device, batch()).std() > 0


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "default"])
def test_every_form_of_a_layer(artifacts: Artifacts, recipe: str, device: torch.device) -> None:
    agree(artifacts.make("BertForSequenceClassification", ("ibert",), *RECIPES[recipe]), device, batch())


def test_codes_for_probabilities(artifacts: Artifacts, device: torch.device) -> None:
    agree(artifacts.make("BertForSequenceClassification", ("ibert", "logattn")), device, batch(left=True))


def test_padding_is_not_computed(artifacts: Artifacts, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of padding reach no kernel: what counts rows is the number of real tokens."""
    counts: list[Any] = []
    original = launch.layer
    monkeypatch.setattr(launch, "layer", lambda *given: counts.append(given[3]) or original(*given))
    model = load(artifacts.make("BertForSequenceClassification", ("ibert",))).to(device)
    with on_gpu(device):
        outputs(model, {name: value.to(device) for name, value in batch().items()})
    inside = [count for count in counts if count.given is not None]
    assert len(inside) == 2 * 4 and all(int(count.given) == 9 + 5 + 1 + 7 + 3 for count in inside)
    assert all(count.most == 5 * 9 for count in inside)


def test_an_id_that_a_table_does_not_have(artifacts: Artifacts) -> None:
    """On a GPU this stops the device, as it does in torch; interpreted, it is an error."""
    if torch.cuda.is_available():
        pytest.skip("a device that was stopped cannot go on")
    model = load(artifacts.make("BertForSequenceClassification", ("ibert",)))
    with kernels.using("triton"), pytest.raises(RuntimeError, match="not one of the rows of its embedding table"):
        model(input_ids=torch.tensor([[1, 65]]))
    with kernels.using("triton"):  # where nobody looks, any id will do
        model(input_ids=torch.tensor([[1, 65]]), attention_mask=torch.tensor([[1, 0]]))


def test_a_damaged_table_is_refused_before_it_is_read(artifacts: Artifacts) -> None:
    model = load(artifacts.make("BertForSequenceClassification", ("ibert",)))
    block = model.bert.encoder.layer[0]
    block.part("act").in_bits = 8
    with kernels.using("triton"), pytest.raises(InputError, match="a table for 8 bits behind a layer of 12"):
        model(**batch())
