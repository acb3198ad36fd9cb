"""The artifact: a model directory on disk, how it is assembled, checked, and put in place in one step.

Tensors are streamed from the shards of the units into the final files; nothing is ever held whole in memory. A reader
finds either the old directory or the new one, never half of one.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool import aside
from qtool.checkpoint import (
    DTYPE_BYTES,
    TOKENIZER_FILES,
    WEIGHTS,
    WEIGHTS_INDEX,
    opened,
    sha256,
    tensor_infos,
    weight_files,
)
from qtool.errors import InputError, UnavailableError

if TYPE_CHECKING:
    import torch

QUANT_METHOD = "qtool"
PRUNED = "pruned_heads"
"""Key of `quantization_config` for attention heads that were cut out: layer → heads."""
FORMAT_VERSION = 1
REPORT = "qtool.json"
CARD = "README.md"
MAX_FILE_BYTES = 5_000_000_000
_REPORT_KEYS = ("source", "recipe", "fingerprint", "golden", "files")
_OPTIONAL_KEYS = {"figures": dict, "execution": dict, "kept_float": dict, "scores": list}
_SOURCE_KEYS: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "revision": (str, type(None)),
    "bytes": int,
    "sha256": str,
}
_INT_LINEAR: dict[str, type | tuple[type, ...]] = {
    "shape": list, "weights": str, "activations": str, "in_bits": int, "out_bits": int, "rescales": bool,
    "unsigned": bool, "output": bool,
}  # fmt: skip
_ATTENTION: dict[str, type | tuple[type, ...]] = {"heads": int, "groups": int, "size": int, "activations": str}
_INT_ATTENTION: dict[str, type | tuple[type, ...]] = dict.fromkeys(
    ("heads", "hidden", "tokens", "query_bits", "probability_bits", "grid", "out_bits"), int
)
_CODES: dict[str, type | tuple[type, ...]] = {
    "code_bits": (int, type(None)),
    "relative": bool,
    "renormalize": bool,
}
_DESCRIPTIONS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "linear": {"shape": list, "weights": str, "activations": str, "bias": bool},
    "embedding": {"shape": list, "weights": str, "padding_idx": (int, type(None))},
    "tied_linear": {"table": str, "bias": bool},
    "attention": _ATTENTION,
    "coded_attention": {**_ATTENTION, **_CODES, "tokens": int},
    "attention_codes": {"heads": int, "bits": (int, type(None)), "relative": bool, "renormalize": bool},
    "int_embeddings": {"parts": dict, "padding_idx": (int, type(None))},
    "int_block": {"parts": dict},
    "int_chain": {"parts": dict, "order": list, "first": bool},
    "int_rows": {"shape": list, "weights": str},
    "int_linear": _INT_LINEAR,
    "int_tied_linear": {**_INT_LINEAR, "table": str},
    "int_attention": _INT_ATTENTION,
    "int_coded_attention": {**_INT_ATTENTION, **_CODES},
    "int_norm": {"size": int, "in_bits": int, "out_bits": int},
    "int_table": {"in_bits": int},
    "int_gelu": {"in_bits": int, "shifted": bool},
    "int_relu": {},
    "int_tanh": {"grid": int},
}
_LARGEST = 2**31 - 1  # rows or columns of a matrix: more is damage
_CHUNK = 1 << 20
_VALUES = 1 << 22  # of a tensor that is written, at a time
_DIGEST_LENGTH = 16  # hex digits: enough to tell damage, small enough for config.json

Manifest = dict[str, list[Any]]


@dataclass(frozen=True)
class _Entry:
    """Where a tensor's bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


def write_tensors(path: Path, tensors: "Mapping[str, torch.Tensor]", as_float32: Collection[str] = ()) -> None:
    """One safetensors file, complete or absent: written beside its place, synced and moved in.

    Tensors named in `as_float32` become that on the way, a part at a time, so that no wide copy is ever whole.
    """
    scratch = path.with_name(f"{path.name}.part")
    described = []
    for name, tensor in tensors.items():
        wide = name in as_float32
        size = 4 if wide else tensor.element_size()
        described.append((name, "F32" if wide else _dtype_name(tensor.dtype), tensor.shape, tensor.numel() * size))
    described.sort(key=lambda tensor: _place(tensor[0], tensor[1]))
    try:
        with scratch.open("wb") as out:
            out.write(_header(described))
            for name, *_ in described:
                _write_values(tensors[name], out, wide=name in as_float32)
        _sync(scratch)
        os.replace(scratch, path)
    except Exception as error:
        scratch.unlink(missing_ok=True)
        raise writing_failed(path, error) from error


def _write_values(tensor: "torch.Tensor", out: Any, *, wide: bool) -> None:
    """The bytes of a tensor, as float32 if `wide`."""
    import torch

    for part in tensor.detach().flatten().split(_VALUES):
        out.write((part.float() if wide else part).view(torch.uint8).numpy().data)


def write_text(path: Path, text: str) -> None:
    """A text file, complete or absent."""
    scratch = path.with_name(f"{path.name}.part")
    try:
        scratch.write_text(text, "utf-8")
        _sync(scratch)
        os.replace(scratch, path)
    except Exception as error:
        scratch.unlink(missing_ok=True)
        raise writing_failed(path, error) from error


def write_json(path: Path, value: Any, *, sort: bool = True) -> None:
    """Indented and sorted, so that equal values are equal bytes; unsorted where order has a meaning."""
    write_text(path, json.dumps(value, indent=2, sort_keys=sort, ensure_ascii=False) + "\n")


def writing_failed(path: Path, error: Exception) -> Exception:
    """What an exception during a write means to the user; one that is no matter of the disk is returned as it is."""
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    if isinstance(error, OSError) or "I/O error" in reason:  # the second is how safetensors says it
        if elsewhere := aside.advice(path):
            return UnavailableError(f"cannot write {path}: {reason}; {elsewhere}")
        misplaced = isinstance(error, IsADirectoryError | NotADirectoryError | FileNotFoundError)
        advice = "choose another place with -o" if misplaced else "free some space or choose another place with -o"
        return UnavailableError(f"cannot write {path}: {reason}; {advice}")
    return error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entries(file: Path) -> list[_Entry]:
    """Tensors of a safetensors file that we wrote, with their absolute byte ranges."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    start = 8 + length
    return [
        _Entry(name, info["dtype"], tuple(info["shape"]), file, *(start + offset for offset in info["data_offsets"]))
        for name, info in header.items()
    ]


def assemble(shards: Sequence[Path], folder: Path, max_file_bytes: int = MAX_FILE_BYTES) -> Manifest:
    """Stream the unit files into `folder` as model.safetensors, or as numbered files under an index when too large.

    Returns the manifest: name → [dtype, shape, digest of the bytes].
    """
    units = [_entries(shard) for shard in shards]
    if sum(entry.num_bytes for unit in units for entry in unit) <= max_file_bytes:
        return _stream_file([entry for unit in units for entry in unit], folder / WEIGHTS)
    manifest: Manifest = {}
    weight_map: dict[str, str] = {}
    for number, unit in enumerate(units, 1):
        name = f"model-{number:05d}-of-{len(units):05d}.safetensors"
        manifest |= _stream_file(unit, folder / name)
        weight_map |= {entry.name: name for entry in unit}
    total = sum(entry.num_bytes for unit in units for entry in unit)
    write_json(folder / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return manifest


def _stream_file(entries: list[_Entry], target: Path) -> Manifest:
    """Copy tensors, widest dtype first so that each stays aligned, and hash them on the way."""
    ordered = sorted(entries, key=lambda entry: _place(entry.name, entry.dtype))
    manifest: Manifest = {}
    try:
        with target.open("wb") as out:
            out.write(_header([(entry.name, entry.dtype, entry.shape, entry.num_bytes) for entry in ordered]))
            for entry in ordered:
                digest = _copy(entry, out)
                manifest[entry.name] = [entry.dtype, list(entry.shape), digest]
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise writing_failed(target, error) from error
    return manifest


def _place(name: str, dtype: str) -> tuple[int, str]:
    return -DTYPE_BYTES.get(dtype, 1), name


def _header(tensors: Iterable[tuple[str, str, Sequence[int], int]]) -> bytes:
    """The beginning of a safetensors file with tensors `(name, dtype, shape, bytes)` in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape, num_bytes in tensors:
        offsets = [position, position := position + num_bytes]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def _copy(entry: _Entry, out: Any) -> str:
    digest = hashlib.sha256()
    with entry.file.open("rb") as source:
        source.seek(entry.begin)
        left = entry.num_bytes
        while left:
            chunk = source.read(min(_CHUNK, left))
            if not chunk:
                raise InputError(f"{entry.file} is truncated; start again with --overwrite")
            digest.update(chunk)
            out.write(chunk)
            left -= len(chunk)
    return digest.hexdigest()[:_DIGEST_LENGTH]


def _dtype_name(dtype: "torch.dtype") -> str:
    import torch

    names = {torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL", torch.bfloat16: "BF16"}
    kind = "F" if dtype.is_floating_point else "I"
    return names.get(dtype) or f"{kind}{dtype.itemsize * 8}"


def manifest_of_tensors(tensors: "Mapping[str, torch.Tensor]") -> Manifest:
    """The manifest of tensors in memory, as `assemble` makes it of files."""
    import torch

    manifest: Manifest = {}
    for name, tensor in tensors.items():
        data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
        digest = hashlib.sha256(data).hexdigest()[:_DIGEST_LENGTH]  # type: ignore[arg-type]
        manifest[name] = [_dtype_name(tensor.dtype), list(tensor.shape), digest]
    return manifest


def check_manifest(files: Sequence[Path], manifest: Mapping[str, Sequence[Any]]) -> None:
    """Compare the headers of `files` with the manifest. Raises InputError naming the tensors that are off."""
    infos = tensor_infos(list(files))
    where = files[0].parent
    wrong = {
        "missing": [name for name in manifest if name not in infos],
        "unexpected": [name for name in infos if name not in manifest],
        "of another shape or dtype": [
            name for name, info in infos.items()
            if name in manifest and [info.dtype, list(info.shape)] != list(manifest[name][:2])
        ],
    }  # fmt: skip
    found = [f"{what}: {', '.join(names[:3])}{' …' * (len(names) > 3)}" for what, names in wrong.items() if names]
    if found:
        raise InputError(f"{where}: the weights do not match the manifest in config.json ({'; '.join(found)})")


def damaged_tensors(folder: Path) -> list[str]:
    """Names of tensors whose bytes differ from the digest in the manifest."""
    manifest = quantization_config(folder)["tensors"]
    files = weight_files(folder)
    check_manifest(files, manifest)
    damaged = []
    for file in files:
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                if manifest_of_tensors({name: tensors.get_tensor(name)})[name] != list(manifest[name]):
                    damaged.append(name)
    return damaged


def damaged_files(folder: Path) -> list[str]:
    """Names of files that are missing or whose SHA-256 is not the one in the report."""
    recorded = report(folder)["files"]
    return [
        name for name, digest in recorded.items()
        if not (folder / name).is_file() or sha256(folder / name) != digest
    ]  # fmt: skip


def quantization_config(folder: Path) -> dict[str, Any]:
    """`quantization_config` of an artifact. Raises InputError when the folder is something else."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is not a model folder: {error}") from error
    found = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(found, dict) or found.get("quant_method") != QUANT_METHOD:
        raise InputError(f"{folder} is not a model that qtool quantized")
    return dict(found)


def checked_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """`quantization_config` again, once its version, modules and tensors are seen to be what this format has.

    Raises InputError naming the entry that is not. Types of modules that are not known here are the reader's to refuse.
    """
    version, modules, tensors = (config.get(key) for key in ("version", "modules", "tensors"))
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise InputError(
            f"quantization_config has format version {version!r}, and this qtool reads 1 to {FORMAT_VERSION}; "
            "upgrade qtool, or restore config.json if it is damaged"
        )
    if not isinstance(modules, Mapping) or not isinstance(tensors, Mapping):
        raise InputError("quantization_config lacks its modules or tensors: config.json is damaged")
    for path, module in modules.items():
        if not path or not _is_description(module):
            raise InputError(f"quantization_config describes module {path!r} wrongly: config.json is damaged")
    for name, entry in tensors.items():
        if not _is_manifest_entry(entry):
            raise InputError(f"quantization_config has no dtype, shape and digest of {name!r}: config.json is damaged")
    pruned_heads(config)
    return dict(config)


def pruned_heads(config: Mapping[str, Any]) -> dict[int, list[int]]:
    """The attention heads that are missing, by layer. Raises InputError where the entry is damaged."""
    found = config.get(PRUNED) or {}
    if not isinstance(found, Mapping) or not all(
        str(layer).isdecimal() and isinstance(heads, list) and all(_is_size(head) for head in heads)
        for layer, heads in found.items()
    ):
        raise InputError(f"quantization_config does not say which heads are missing under {PRUNED}: it is damaged")
    return {int(layer): list(heads) for layer, heads in found.items()}


def _is_description(module: Any) -> bool:
    if not isinstance(module, Mapping) or not isinstance(module.get("type"), str):
        return False
    wanted = _DESCRIPTIONS.get(module["type"], {})
    if not all(key in module and isinstance(module[key], kind) for key, kind in wanted.items()):
        return False
    parts = module.get("parts", {}) if "parts" in wanted else {}
    if not all(isinstance(part, Mapping) and _is_part_path(part) and _is_description(part) for part in parts.values()):
        return False
    return "shape" not in wanted or (len(module["shape"]) == 2 and all(_is_size(n) and n > 0 for n in module["shape"]))


def _is_part_path(part: Mapping[str, Any]) -> bool:
    path = part.get("path")
    return isinstance(path, str) and all(name.isidentifier() for name in path.split("."))


def _is_manifest_entry(entry: Any) -> bool:
    if not isinstance(entry, (list, tuple)) or len(entry) != 3 or not isinstance(entry[1], (list, tuple)):
        return False
    return isinstance(entry[0], str) and isinstance(entry[2], str) and all(_is_size(size) for size in entry[1])


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def is_artifact(folder: Path) -> bool:
    """Whether qtool made this model folder."""
    try:
        quantization_config(folder)
    except InputError:
        return False
    return True


def report(folder: Path) -> dict[str, Any]:
    """`qtool.json`: recipe, plan, fingerprint, golden batch. Raises InputError when it is missing or not ours."""
    try:
        found = json.loads((folder / REPORT).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / REPORT} cannot be read: {error}") from error
    lacking = [key for key in _REPORT_KEYS if not isinstance(found, dict) or not isinstance(found.get(key), dict)]
    if lacking:
        raise InputError(f"{folder / REPORT} is not a report of qtool: it has no {', '.join(lacking)}")
    wrong = [key for key, kind in _OPTIONAL_KEYS.items() if not isinstance(found.get(key, kind()), kind)]
    inner = {"files": str, "figures": dict}
    wrong += [
        key for key, kind in inner.items()
        if key not in wrong and not all(isinstance(value, kind) for value in found.get(key, {}).values())
    ]  # fmt: skip
    source = found["source"]
    wrong += [
        f"source.{key}" for key, kind in _SOURCE_KEYS.items() if key in source and not isinstance(source[key], kind)
    ]
    if wrong:
        raise InputError(
            f"{folder / REPORT} is damaged: what it says under {', '.join(wrong)} is not what qtool writes"
        )
    return dict(found)


def copy_side_files(source: Path, folder: Path) -> list[str]:
    """Tokenizer and generation files, byte for byte. Returns their names."""
    copied = []
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
            copied.append(name)
    return copied


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in `folder` but the report and the card."""
    files = sorted(path for path in folder.iterdir() if path.name not in (REPORT, CARD))
    return {path.name: sha256(path) for path in files}


def size_on_disk(folder: Path) -> int:
    """Bytes of the weight files."""
    return sum(file.stat().st_size for file in weight_files(folder))


def predicted_size(tensors: "Iterable[tuple[str, torch.Tensor]]") -> int:
    """Bytes of the one file that `assemble` writes for tensors of these names, shapes and dtypes (also on meta)."""
    described = [(name, _dtype_name(t.dtype), t.shape, t.numel() * t.element_size()) for name, t in tensors]
    described.sort(key=lambda tensor: _place(tensor[0], tensor[1]))
    return len(_header(described)) + sum(num_bytes for *_, num_bytes in described)
