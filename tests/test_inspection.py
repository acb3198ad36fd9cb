"""`inspect` of artifacts that are intact, from another machine, or damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qtool
from qtool.errors import InputError
from qtool.inspection import inspect


@pytest.fixture(scope="module")
def made(shelf: Any) -> Path:
    model = shelf.make("inspected", labels=("bad", "good"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shelf.folder)
        patch.setattr("qtool.pipeline._check_in_fresh_process", lambda *run: None)
        entries = ["calibration.source=random", "calibration.num_samples=8"]
        return qtool.quantize(str(model), method="zeroquant", output=shelf.folder / "inspected-int8", set=entries).path


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def edit_report(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    report = json.loads((folder / "qtool.json").read_text())
    edit(report)
    (folder / "qtool.json").write_text(json.dumps(report))
    return folder


def test_an_intact_artifact(artifact: Path) -> None:
    found = inspect(artifact, verify=True)
    assert found["checks"] == {"tensor digests": "intact", "file digests": "intact", "golden batch": "agrees"}
    assert found["damage"] == [] and found["methods"] == ["zeroquant"]


@pytest.mark.parametrize("key", ["instruction set", "threads", "versions"])
def test_floats_of_another_machine_may_round_differently(artifact: Path, key: str) -> None:
    def round_differently(report: dict[str, Any]) -> None:
        logits = report["golden"]["outputs"]["logits"]
        logits.update(sha256="0" * 64, first=[1.02 * value for value in logits["first"]])

    edit_report(artifact, round_differently)
    assert inspect(artifact, verify=True)["checks"]["golden batch"] == "differs"
    other = {"instruction set": "ppc64le", "threads": 77, "versions": {"torch": "1.0"}}
    edit_report(artifact, lambda report: report["fingerprint"].update({key: other[key]}))
    found = inspect(artifact, verify=True)
    assert found["checks"]["golden batch"] == "agrees within 1.96% (made on another CPU, thread count or version)"
    assert found["damage"] == []


def test_another_thread_count_of_this_process(artifact: Path) -> None:
    edit_report(artifact, lambda report: report["golden"]["outputs"]["logits"].update(sha256="0" * 64))
    assert inspect(artifact, verify=True)["damage"] != []
    torch.set_num_threads(1)
    assert inspect(artifact, verify=True)["damage"] == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("figures", []),
        ("figures", {"a": 3}),
        ("execution", "real"),
        ("kept_float", []),
        ("scores", {}),
        ("files", {"config.json": 3}),
        ("source", {"bytes": "many"}),
        ("source", {"name": 5}),
        ("source", {"revision": []}),
        ("source", {"sha256": None}),
        ("source", []),
        ("fingerprint", None),
        ("golden", []),
    ],
)
def test_a_damaged_report_is_one_line(artifact: Path, key: str, value: Any) -> None:
    edit_report(artifact, lambda report: report.update({key: value}))
    for verify in (False, True):
        with pytest.raises(InputError, match=rf"qtool\.json .*{key}") as error:
            inspect(artifact, verify=verify)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("golden", [{}, {"inputs": {}, "outputs": {}}, {"inputs": {"input_ids": [[1]]}, "outputs": 1}])
def test_a_damaged_golden_batch_is_damage(artifact: Path, golden: dict[str, Any]) -> None:
    edit_report(artifact, lambda report: report.update(golden=golden))
    assert inspect(artifact)["damage"] == []
    found = inspect(artifact, verify=True)
    assert found["checks"]["golden batch"] == "cannot be computed"
    assert len(found["damage"]) == 1 and "golden batch" in found["damage"][0]


def test_odd_figures_and_methods_are_shown_as_unknown(artifact: Path) -> None:
    def edit(report: dict[str, Any]) -> None:
        for figures in report["figures"].values():
            figures["weight_sqnr_db"] = "high"

    edit_report(artifact, edit)
    config = json.loads((artifact / "config.json").read_text())
    config["quantization_config"]["methods"] = 7
    (artifact / "config.json").write_text(json.dumps(config))
    found = inspect(artifact)
    assert {row["sqnr"] for row in found["modules"]} == {"-"} and found["methods"] == []
    json.dumps(found)


def test_the_folder_of_a_damaged_config_is_named(artifact: Path) -> None:
    config = json.loads((artifact / "config.json").read_text())
    config["quantization_config"]["version"] = True
    (artifact / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="format version True") as error:
        inspect(artifact)
    assert str(error.value).startswith(f"{artifact}: ")
