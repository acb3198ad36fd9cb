"""The golden batch: what is recorded, and when a difference is damage."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qtool import golden
from qtool.errors import InputError

INPUTS = {"input_ids": torch.tensor([[2, 7, 8, 3], [2, 9, 3, 0]]), "attention_mask": torch.ones(2, 4).long()}


def outputs(model: Path) -> dict[str, torch.Tensor]:
    return golden.compute(model, INPUTS)


def record(found: dict[str, torch.Tensor]) -> dict[str, Any]:
    """As it is after a journey through JSON."""
    result: dict[str, Any] = json.loads(json.dumps(golden.record(INPUTS, found)))
    return result


def test_a_record_has_the_digest_of_all_and_the_first_values() -> None:
    value = torch.randn(3, 10, 20, generator=torch.Generator().manual_seed(0))
    kept = record({"short": value[0, 0], "long": value})["outputs"]
    assert kept["short"]["first"] == value[0, 0].tolist()
    assert kept["long"]["first"] == value.flatten()[:256].tolist()
    assert kept["long"]["shape"] == [3, 10, 20]
    assert kept["long"]["sha256"] == hashlib.sha256(np.ascontiguousarray(value.numpy()).tobytes()).hexdigest()


@pytest.mark.parametrize("same_machine", [True, False])
def test_an_intact_model_agrees(tiny: Any, same_machine: bool) -> None:
    found = golden.recheck(tiny.model, record(outputs(tiny.model)), same_machine=same_machine)
    assert (found.verdict, found.damage) == ("agrees", [])


def test_the_last_bit_counts_on_the_same_machine_only(tiny: Any) -> None:
    off = {name: value.clone() for name, value in outputs(tiny.model).items()}
    off["logits"][-1, -1] = torch.nextafter(off["logits"][-1, -1], torch.tensor(9e9))
    recorded = record(off)
    here = golden.recheck(tiny.model, recorded, same_machine=True)
    assert here.verdict == "differs" and here.damage[0].startswith("logits: differs from the recorded golden batch")
    elsewhere = golden.recheck(tiny.model, recorded, same_machine=False)
    assert elsewhere.damage == []
    assert elsewhere.verdict == "agrees within 0.00% (made on another CPU, thread count or version)"


@pytest.mark.parametrize(("factor", "damaged"), [(1.035, False), (0.92, False), (1.12, True), (0.0, True), (-1, True)])
def test_elsewhere_only_gross_differences_are_damage(tiny: Any, factor: float, damaged: bool) -> None:
    """Recorded values that are `factor` times the true ones are off by |1 - factor| / |factor|."""
    recorded = record({name: value * factor for name, value in outputs(tiny.model).items()})
    found = golden.recheck(tiny.model, recorded, same_machine=False)
    assert bool(found.damage) == damaged
    if not damaged:
        share = abs(1 - factor) / abs(factor)
        assert found.verdict == f"agrees within {share:.2%} (made on another CPU, thread count or version)"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_damage(tiny: Any, value: float) -> None:
    recorded = record({"logits": torch.full_like(outputs(tiny.model)["logits"], value)})
    assert golden.recheck(tiny.model, recorded, same_machine=False).verdict == "differs"


def test_missing_outputs_and_other_shapes_are_damage(tiny: Any) -> None:
    found = outputs(tiny.model)
    for wrong in ({"scores": found["logits"]}, {"logits": found["logits"][:1]}):
        assert "another shape" in golden.recheck(tiny.model, record(wrong), same_machine=False).damage[0]


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": {}},
        {"inputs": [1]},
        {"outputs": {}},
        {"outputs": None},
        {"outputs": {"logits": 3}},
        {"outputs": {"logits": {"shape": [2, 2], "sha256": "0"}}},
        {"outputs": {"logits": {"shape": [2, 2], "sha256": "0", "first": ["1"]}}},
        {"outputs": {"logits": {"shape": 4, "sha256": "0", "first": [1.0]}}},
        {"inputs": {"input_ids": [[1, 2], [3]]}},
        {"inputs": {"input_ids": "abc"}},
        {"inputs": {"input_ids": [["a"]]}},
        {"inputs": {"input_ids": [[0.5]]}},
        {"inputs": {"input_ids": [[10**30]]}},
        {"inputs": {"input_ids": [[10**6]]}},
        {"inputs": {"attention_mask": [[1]]}},
    ],
)
def test_a_damaged_record_is_one_line(tiny: Any, change: dict[str, Any]) -> None:
    recorded = {**record(outputs(tiny.model)), **change}
    with pytest.raises(InputError, match="golden batch") as error:
        golden.recheck(tiny.model, recorded, same_machine=True)
    assert str(tiny.model) in str(error.value) and "\n" not in str(error.value)


def test_an_empty_record_is_damaged(tiny: Any) -> None:
    with pytest.raises(InputError, match="has no inputs"):
        golden.recheck(tiny.model, {}, same_machine=True)


def test_a_class_that_does_not_exist(zoo: Any) -> None:
    model = zoo.make("m")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["BertForNothing"]}))
    with pytest.raises(InputError, match="no class BertForNothing"):
        golden.compute(model, INPUTS)
