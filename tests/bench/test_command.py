"""`qtool bench`: its errors, and real engines on a tiny model."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.bench import engines
from qtool.kernels import triton

Command = Callable[..., Any]
COMPILED = ("torch", "torch-compile", "torchao")  # or the reference itself
QUICK = ("--rounds", 2, "--seconds", 0, "--threads", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "which models"),
        (("MODEL", "--shapes", "8by8"), "is no shape"),
        (("MODEL", "--engines", "tensorflow"), "unknown engine 'tensorflow'"),
        (("MODEL", "--data", "DATA"), "--data is for the texts of a task"),
        (("MODEL", "--method", "ibert"), "--method and --set are for --random-init"),
        (("MODEL", "MODEL"), "a model is named twice"),
        (("MODEL", "--task", "sst"), "unknown task 'sst'"),
        (("MODEL", "--shapes", ""), "is no shape"),
        (("MODEL", "--seconds", "nan"), "--seconds is not a number"),
        (("MODEL", "--device", "gpu"), "unknown device 'gpu'; models compute on cpu, cuda or cuda:N"),
        (("MODEL", "--cold-l2"), "--cold-l2 is for a GPU"),
        (("--random-init", "nowhere", "--device", "gpu"), "unknown device 'gpu'"),
        (("--random-init", "MODEL", "--seed", "99999999999999999999"), "--seed"),
        (("--random-init", "nowhere", "--engines", "tensorflow"), "unknown engine 'tensorflow'"),
    ],
)
def test_usage_errors(tiny: Any, desk: Path, qtool_command: Command, arguments: Any, message: str) -> None:
    named = {"MODEL": tiny.model, "DATA": tiny.data}
    ended = qtool_command("bench", *(named.get(word, word) for word in arguments))
    assert ended.code == 2 and message in ended.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere/at/all",), "no model"),
        (("MODEL", "--shapes", "1x400"), "positions"),
        (("MODEL", "--shapes", "1@8"), "for causal language models"),
        (("MODEL", "--shapes", "1x8", "--json", "nowhere/file.json"), "--json cannot write"),
        (("--random-init", "."), "has no config.json"),
    ],
)
def test_input_errors(tiny: Any, desk: Path, qtool_command: Command, arguments: Any, message: str) -> None:
    ended = qtool_command("bench", *(tiny.model if word == "MODEL" else word for word in arguments))
    assert ended.code == 3 and message in ended.errors[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "takes no tokens"),
        ({"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 100}, "makes no model of this config"),
        ({"model_type": "bert", "architectures": ["AutoTokenizer"]}, "no model AutoTokenizer"),
        ({"model_type": "bert", "architectures": ["BertConfig"]}, "no model BertConfig"),
    ],
)
def test_configs_without_a_random_model(desk: Path, qtool_command: Command, config: Any, message: str) -> None:
    Path("folder").mkdir()
    Path("folder", "config.json").write_text(json.dumps(config), "utf-8")
    ended = qtool_command("bench", "--random-init", "folder", "--engines", "torch", *QUICK)
    assert ended.code == 3 and message in ended.errors[-1] and len(ended.errors) == 1


def test_an_artifact_whose_methods_are_no_list(tiny: Any, desk: Path, qtool_command: Command) -> None:
    assert qtool_command("quantize", tiny.model, "--method", "zeroquant", "-o", "out").code == 0
    config = json.loads(Path("out/config.json").read_text("utf-8"))
    config["quantization_config"]["methods"] = 3
    Path("out/config.json").write_text(json.dumps(config), "utf-8")
    ended = qtool_command("bench", "out", "--shapes", "1x8", *QUICK)
    assert ended.code == 3 and "no list" in ended.errors[-1]


def test_json_goes_to_files_alone(tiny: Any, desk: Path, qtool_command: Command) -> None:
    os.mkfifo("pipe")
    Path("pipe.json").symlink_to("pipe")
    for name in ("pipe", "pipe.json"):
        ended = qtool_command("bench", tiny.model, "--json", name)
        assert ended.code == 3 and "it is no file" in ended.errors[0]
    assert Path("pipe").is_fifo()
    Path("real.json").write_text("before", "utf-8")
    Path("link.json").symlink_to("real.json")
    assert qtool_command("methods", "--json", "link.json").code == 0
    assert Path("link.json").is_symlink()
    assert "zeroquant" in Path("real.json").read_text("utf-8")


def test_an_engine_that_is_not_installed(
    tiny: Any, desk: Path, qtool_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    ended = qtool_command("bench", tiny.model, "--shapes", "1x8", "--engines", "torch,onnxruntime")
    assert ended.code == 4
    assert ended.errors == ["engine onnxruntime needs onnxruntime, onnx, onnxscript: pip install 'qtool[bench]'"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_without_a_gpu(
    tiny: Any, desk: Path, qtool_command: Command, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton.reason.cache_clear()
    for model in ((tiny.model,), ("--random-init", "nowhere")):  # said before anything is looked for or made
        ended = qtool_command("bench", *model, "--device", device)
        assert ended.code == 4 and ended.out == ""
        assert ended.errors == [f"--device {device}: {triton.reason()}, or leave it out: the CPU serves every model"]


@pytest.mark.slow
def test_a_decoder_writes_behind_a_cache(desk: Path, qtool_command: Command) -> None:
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
    }  # fmt: skip
    Path("shape").mkdir()
    Path("shape", "config.json").write_text(json.dumps(config), "utf-8")
    ended = qtool_command(
        "bench", "--random-init", "shape", "--method", "zeroquant", "--shapes", "2@8", "--engines", "torch", "--json",
        "-", *QUICK,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    body = json.loads(ended.out)
    assert (body["shapes"][0]["tokens"], body["peaks"], body["settings"]["device"]) == (2, None, "cpu")
    assert [entry["engine"] for entry in body["entries"]] == ["torch", "qtool"]
    for entry in body["entries"]:
        assert entry["timings"][0]["p50_ms"] > 0 and entry["timings"][0]["rates"] is None
        assert entry["read_bytes"] > 0 and entry["peak_gpu_bytes"] is None


@pytest.mark.slow
def test_float_and_artifact_side_by_side(tiny: Any, desk: Path, qtool_command: Command) -> None:
    assert qtool_command("quantize", tiny.model, "--method", "zeroquant", "-o", "out", "-q").code == 0
    ended = qtool_command(
        "bench", tiny.model, "out", "--shapes", "1x8", "--task", "sst2", "--data", tiny.data, "--engines", "torch",
        "--json", "-", *QUICK,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    body = json.loads(ended.out)
    assert [(entry["model"], entry["engine"]) for entry in body["entries"]] == [
        ("tiny-sst2", "torch"),
        ("out", "qtool"),
    ]
    assert body["entries"][1]["methods"] == ["zeroquant"]
    fixed, ragged = ((shape["shape"], shape["sequences"]) for shape in body["shapes"])
    texts = (tiny.data / "validation.jsonl").read_text().splitlines()
    assert fixed == ("1x8", 1) and ragged == ("sst2:32", len(texts))
    for entry, folder in zip(body["entries"], (tiny.model, desk / "out"), strict=True):
        assert entry["size_bytes"] == os.path.getsize(folder / "model.safetensors")
        assert entry["threads"] == 1 and entry["peak_rss_bytes"] > entry["imports_rss_bytes"] > 50e6
        assert all(timing["p95_ms"] >= timing["p50_ms"] > 0 for timing in entry["timings"])
    assert 0 < body["entries"][1]["agreement"]["relative"] < 0.5


@pytest.mark.slow
def test_an_artifact_alone_is_compared_with_its_recorded_source(tiny: Any, desk: Path, qtool_command: Command) -> None:
    assert qtool_command("quantize", tiny.model, "--method", "zeroquant", "-o", "out", "-q").code == 0
    ended = qtool_command("bench", "out", "--shapes", "1x8", "--json", "-", *QUICK)
    assert ended.code == 0, ended.err
    (entry,) = json.loads(ended.out)["entries"]
    assert entry["engine"] == "qtool" and 0 < entry["agreement"]["relative"] < 0.5


@pytest.mark.slow
def test_a_damaged_artifact_is_an_error_and_the_others_are_shown(tiny: Any, desk: Path, qtool_command: Command) -> None:
    assert qtool_command("quantize", tiny.model, "--method", "zeroquant", "-o", "out", "-q").code == 0
    config = json.loads(Path("out/config.json").read_text())
    config["quantization_config"]["tensors"].popitem()
    Path("out/config.json").write_text(json.dumps(config))
    ended = qtool_command("bench", tiny.model, "out", "--shapes", "1x8", "--engines", "torch", *QUICK)
    assert ended.code == 3 and "out on qtool" in ended.errors[0]
    assert "1.00x" in ended.out and "Failed" in ended.out


@pytest.mark.slow
def test_a_config_alone_is_enough(
    zoo: Any, desk: Path, qtool_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shape"
    folder.mkdir()
    shutil.copyfile(zoo.make("whole", words=None) / "config.json", folder / "config.json")
    (scratch := tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    ended = qtool_command(
        "bench", "--random-init", folder, "--method", "zeroquant", "--method", "ibert", "--shapes", "2x8",
        "--engines", "torch", "--json", "-", "-q", *QUICK,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    found = [(entry["model"], entry["methods"]) for entry in json.loads(ended.out)["entries"]]
    name = "random-shape"
    assert found == [(name, []), (f"{name}-zeroquant", ["zeroquant"]), (f"{name}-ibert", ["ibert"])]
    assert list(desk.iterdir()) == list(scratch.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("engine", [name for name in engines.ENGINES if name not in COMPILED])
def test_every_engine_computes_the_model(tiny: Any, desk: Path, qtool_command: Command, engine: str) -> None:
    lacking = [package for package in engines.ENGINES[engine].packages if find_spec(package) is None]
    if lacking:
        pytest.skip(f"{', '.join(lacking)} not installed (extra 'bench')")
    ended = qtool_command("bench", tiny.model, "--shapes", "1x8,3x20", "--engines", engine, "--json", "-", *QUICK)
    assert ended.code == 0, ended.err
    (entry,) = json.loads(ended.out)["entries"]
    assert entry["agreement"]["relative"] < (1e-4 if engine.endswith("fp32") else 0.5)
    assert entry["agreement"]["top1"] > 80
