"""The artifact's files: streamed together without a change, predicted, checked, and never left half-written."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from limits import largest_file
from safetensors.torch import load_file, save_file

from qtool import artifact
from qtool.errors import InputError, UnavailableError

Tensors = dict[str, torch.Tensor]

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def filled(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    """Random bytes as a tensor: any bit pattern may be stored, also NaN."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.Size(shape).numel())
    if dtype == torch.bool:
        return torch.randint(2, (count,), generator=generator).bool().view(shape)
    data = torch.randint(256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).view(shape)


tensor = st.builds(filled, st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 5), max_size=3), st.integers(0, 99))
named = st.dictionaries(st.text("abz._é\"'", min_size=1, max_size=6), tensor, max_size=8)


def raw(value: torch.Tensor) -> bytes:
    return value.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def header(file: Path) -> dict[str, Any]:
    """What the first bytes of a safetensors file say, read as the format's description has it."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    parsed: dict[str, Any] = json.loads(data[8 : 8 + length])
    return parsed


def shards_of(tensors: Tensors, folder: Path, count: int) -> list[Path]:
    """The tensors dealt out to `count` files."""
    paths = [folder / f"unit{number}.safetensors" for number in range(count)]
    for number, path in enumerate(paths):
        artifact.write_tensors(path, {n: t for i, (n, t) in enumerate(tensors.items()) if i % count == number})
    return paths


def same(found: Mapping[str, torch.Tensor], expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(
        found[n].dtype == t.dtype and found[n].shape == t.shape and raw(found[n]) == raw(t) for n, t in expected.items()
    )


@given(named, st.integers(1, 4))
def test_assembled_shards_are_the_same_tensors(
    tmp_path_factory: pytest.TempPathFactory, tensors: Tensors, count: int
) -> None:
    folder = tmp_path_factory.mktemp("assembled")
    manifest = artifact.assemble(shards_of(tensors, folder, count), folder)
    file = folder / "model.safetensors"
    assert same(load_file(file), tensors)
    assert header(file)["__metadata__"] == {"format": "pt"}
    assert manifest == {
        name: [DTYPES[t.dtype], list(t.shape), hashlib.sha256(raw(t)).hexdigest()[:16]] for name, t in tensors.items()
    }
    assert artifact.manifest_of_tensors(tensors) == manifest
    assert artifact.predicted_size(tensors.items()) == file.stat().st_size
    for name, entry in header(file).items():
        if name != "__metadata__":
            start = 8 + int.from_bytes(file.read_bytes()[:8], "little") + entry["data_offsets"][0]
            assert start % tensors[name].element_size() == 0, "a memory map needs aligned tensors"


@given(named.filter(lambda tensors: any(t.numel() for t in tensors.values())), st.integers(1, 4))
def test_the_sharded_form_is_the_same_tensors(
    tmp_path_factory: pytest.TempPathFactory, tensors: Tensors, count: int
) -> None:
    folder = tmp_path_factory.mktemp("sharded")
    units = shards_of(tensors, folder, count)
    out = folder / "out"
    out.mkdir()
    manifest = artifact.assemble(units, out, max_file_bytes=0)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(len(raw(t)) for t in tensors.values())}
    found = {name: load_file(out / file)[name] for name, file in index["weight_map"].items()}
    assert same(found, tensors)
    assert {path.name for path in out.iterdir() if path.suffix == ".safetensors"} == {
        f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    }
    files = [out / name for name in sorted(set(index["weight_map"].values()))]
    artifact.check_manifest(files, manifest)
    assert manifest == artifact.manifest_of_tensors(tensors)


def test_one_file_up_to_the_limit(tmp_path: Path) -> None:
    units = shards_of({"a": torch.zeros(10), "b": torch.zeros(15)}, tmp_path, 2)
    artifact.assemble(units, tmp_path, max_file_bytes=100)
    assert (tmp_path / "model.safetensors").is_file()
    (tmp_path / "model.safetensors").unlink()
    artifact.assemble(units, tmp_path, max_file_bytes=99)
    assert not (tmp_path / "model.safetensors").exists()


def test_predicted_size_from_shapes_alone(tmp_path: Path) -> None:
    shapes = [
        (f"encoder.layer.{i}.output.dense.weight", torch.empty(17 + i, 96, 16, 4, dtype=torch.int8)) for i in range(40)
    ]
    tensors = dict(shapes) | {f"encoder.layer.{i}.output.dense.bias": torch.empty(1000 + i) for i in range(40)}
    artifact.assemble(shards_of(tensors, tmp_path, 3), tmp_path)
    meta = ((name, value.to("meta")) for name, value in tensors.items())
    assert artifact.predicted_size(meta) == (tmp_path / "model.safetensors").stat().st_size


def test_tensors_larger_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "_CHUNK", 7)
    tensors = {"a": filled(torch.int16, [50], 1), "b": filled(torch.int8, [7], 2), "c": filled(torch.int8, [0], 3)}
    manifest = artifact.assemble(shards_of(tensors, tmp_path, 1), tmp_path)
    assert same(load_file(tmp_path / "model.safetensors"), tensors)
    assert manifest == artifact.manifest_of_tensors(tensors)


def test_written_tensors_carry_one_metadata_key_and_any_stride(tmp_path: Path) -> None:
    value = torch.arange(12.0).view(3, 4).t()
    artifact.write_tensors(tmp_path / "x.safetensors", {"a": value})
    assert header(tmp_path / "x.safetensors")["__metadata__"] == {"format": "pt"}
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
def test_floats_are_widened_on_the_way(tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "_VALUES", 5)
    draw = torch.Generator().manual_seed(0)
    value, codes = torch.randn(3, 7, generator=draw).to(dtype), torch.arange(11, dtype=torch.int8)
    written = {"value": value.t(), "as it is": value, "codes": codes, "one": value[0, 0]}
    artifact.write_tensors(tmp_path / "x.safetensors", written, as_float32=["value", "one"])
    found = load_file(tmp_path / "x.safetensors")
    assert same(found, {**written, "value": value.t().float(), "one": value[0, 0].float()})


def test_a_truncated_shard_is_an_error(tmp_path: Path) -> None:
    (shard,) = shards_of({"a": torch.zeros(100)}, tmp_path, 1)
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(InputError, match=r"unit0\.safetensors is truncated"):
        artifact.assemble([shard], tmp_path)


# What is done to a checkpoint's tensors, and what must be said of which.
CHANGES = {
    "deleted": (lambda t: t.pop("b"), ["missing: b"]),
    "renamed": (lambda t: t.update(bb=t.pop("b")), ["missing: b", "unexpected: bb"]),
    "reshaped": (lambda t: t.update(b=t["b"].view(2, 2)), ["of another shape or dtype: b"]),
    "cast": (lambda t: t.update(b=t["b"].double()), ["of another shape or dtype: b"]),
    "added": (lambda t: t.update(d=torch.zeros(1)), ["unexpected: d"]),
    "many deleted": (lambda t: [t.pop(name) for name in "abc1"], ["missing: a, b, c …"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_check_manifest_names_the_tensors(change: str, tmp_path: Path) -> None:
    tensors = {name: torch.zeros(4) for name in "abc123"}
    manifest = artifact.manifest_of_tensors(tensors)
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    artifact.check_manifest([file], manifest)
    apply, said = CHANGES[change]
    apply(tensors)
    save_file(tensors, file)
    with pytest.raises(InputError) as caught:
        artifact.check_manifest([file], manifest)
    for words in said:
        assert words in str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As much of an artifact as the checks of its files read."""
    tensors = {"table": filled(torch.int8, [6, 1, 4], 1), "scale": torch.rand(6, 1), "bias": torch.rand(5)}
    out = tmp_path / "out"
    out.mkdir()
    manifest = artifact.assemble(shards_of(tensors, tmp_path, 2), out)
    artifact.write_json(out / "config.json", {"quantization_config": {"quant_method": "qtool", "tensors": manifest}})
    artifact.write_text(out / "vocab.txt", "a\nb\n")
    report = {"source": {}, "recipe": {}, "fingerprint": {}, "golden": {}, "files": artifact.file_digests(out)}
    artifact.write_json(out / "qtool.json", report)
    return out


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def test_an_intact_folder_has_no_damage(folder: Path) -> None:
    assert artifact.damaged_tensors(folder) == []
    assert artifact.damaged_files(folder) == []
    (folder / "README.md").write_text("the card may be edited")
    assert artifact.damaged_files(folder) == []


def test_every_flipped_byte_is_found(folder: Path) -> None:
    weights = folder / "model.safetensors"
    intact = weights.read_bytes()
    entries = header(weights)
    data = 8 + int.from_bytes(intact[:8], "little")
    owners = {
        position: name for name, entry in entries.items() if name != "__metadata__"
        for position in range(data + entry["data_offsets"][0], data + entry["data_offsets"][1])
    }  # fmt: skip
    assert set(owners) == set(range(data, len(intact)))
    for position in range(len(intact)):
        flip(weights, position)
        assert artifact.damaged_files(folder) == ["model.safetensors"]
        if position in owners:
            assert artifact.damaged_tensors(folder) == [owners[position]]
        weights.write_bytes(intact)


def test_damaged_and_missing_files_are_named(folder: Path) -> None:
    flip(folder / "vocab.txt", 0)
    (folder / "config.json").unlink()
    assert artifact.damaged_files(folder) == ["config.json", "vocab.txt"]


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", "{}", '{"files": []}'])
def test_a_report_that_is_none(text: str, folder: Path) -> None:
    (folder / "qtool.json").write_text(text)
    with pytest.raises(InputError, match=r"qtool\.json"):
        artifact.report(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"quantization_config": null}', '{"quantization_config": {"a": 1}}'])
def test_a_folder_that_is_no_artifact(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    assert not artifact.is_artifact(folder)
    with pytest.raises(InputError):
        artifact.quantization_config(folder)


def test_json_is_sorted_unless_order_counts(tmp_path: Path) -> None:
    value = {"b": 1, "a": {"d": "é", "c": 2}}
    artifact.write_json(tmp_path / "x.json", value)
    assert (tmp_path / "x.json").read_bytes().startswith(b'{\n  "a": {\n    "c": 2,\n    "d": "\xc3\xa9"')
    artifact.write_json(tmp_path / "x.json", value, sort=False)
    assert list(json.loads((tmp_path / "x.json").read_text())) == ["b", "a"]


WRITES = {
    "text": lambda path: artifact.write_text(path, "x" * 10_000),
    "json": lambda path: artifact.write_json(path, ["x" * 10_000]),
    "tensors": lambda path: artifact.write_tensors(path, {"a": torch.zeros(10_000)}),
}


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize("before", [None, b"what was there"])
def test_a_write_that_fails_leaves_what_was_there(kind: str, before: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    with largest_file(4_096), pytest.raises(UnavailableError) as caught:
        WRITES[kind](path)
    assert caught.value.exit_code == 4
    assert str(path) in str(caught.value)
    assert "free some space" in str(caught.value)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([] if before is None else [before])
    WRITES[kind](path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() != before


def test_assembling_on_a_full_disk_is_said(tmp_path: Path) -> None:
    units = shards_of({"a": torch.zeros(10_000)}, tmp_path, 1)
    with largest_file(4_096), pytest.raises(UnavailableError, match=r"cannot write .*: File too large"):
        artifact.assemble(units, tmp_path)


@pytest.mark.parametrize("kind", WRITES)
def test_a_folder_in_the_way(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(UnavailableError, match=r"cannot write .*file: Is a directory"):
        WRITES[kind](tmp_path / "file")
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


@pytest.mark.parametrize("kind", WRITES)
def test_a_folder_that_is_gone(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="cannot write"):
        WRITES[kind](tmp_path / "absent" / "file")


def test_what_is_no_matter_of_the_disk_stays_a_bug(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        artifact.write_text(tmp_path / "file", "\ud800")
    assert not list(tmp_path.iterdir())


def test_side_files_are_copied_byte_for_byte(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    for name in ("tokenizer.json", "vocab.txt", "generation_config.json", "pytorch_model.bin", "evil.py", "notes.md"):
        (source / name).write_bytes(name.encode() + b"\xff")
    assert sorted(artifact.copy_side_files(source, out)) == ["generation_config.json", "tokenizer.json", "vocab.txt"]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        name: name.encode() + b"\xff" for name in ("generation_config.json", "tokenizer.json", "vocab.txt")
    }
