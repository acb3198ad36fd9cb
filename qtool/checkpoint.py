"""The float source model: where it is, whether it can be read, and its tensors one at a time.

Only safetensors are read and no code of a model is ever run. Tensors are memory-mapped: what is not read costs nothing,
and what is read can be dropped again by the system; only a copy in another dtype takes memory of the process.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool.errors import InputError, QtoolError, UnavailableError

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "I16": 2, "F16": 2, "BF16": 2}
"""Bytes of a value by safetensors' name of its dtype; the names that are missing take one."""

_FLOATS = ("F64", "F32", "F16", "BF16")
_PART = 1 << 22  # values that are looked at together


def locate(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: a local path, or a hub name that is fetched into the hub's cache.

    Raises InputError when it is no usable model folder, UnavailableError when the hub is needed and not reachable.
    """
    path = Path(name).expanduser()
    if not str(name).strip():
        raise InputError("no model: its name is empty")
    if path.is_dir():
        return _usable(path)
    if path.is_file():
        raise InputError(f"{name} is a file; pass the folder that holds config.json and {WEIGHTS}")
    local = path.parts[:1] and len(path.parts) > 1 and Path(path.parts[0]).exists()
    if local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)) or str(name).startswith((".", "/")):
        raise InputError(f"no model at {name}: the folder does not exist")
    return _usable(_download(str(name), revision))


def _usable(path: Path) -> Path:
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is not a model folder: it has no config.json")
    if (path / WEIGHTS).is_file() or (path / WEIGHTS_INDEX).is_file():
        return path
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.ckpt")):
        raise InputError(
            f"{path} has only pickled weights, which qtool does not open; convert it with transformers: "
            f"AutoModel….from_pretrained('{path}').save_pretrained(folder) writes {WEIGHTS}"
        )
    raise InputError(f"{path} has no {WEIGHTS}")


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.safetensors", "*.safetensors.index.json", "config.json", "README.md", *TOKENIZER_FILES]
    missing = f"no model '{name}': no such local folder, and"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise UnavailableError(
            f"{name} is gated on the hub: accept its terms and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(f"{missing} the hub has no such repository") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UnavailableError(f"{missing} the hub is not reachable; pass a local folder") from error
    except ValueError as error:
        raise InputError(f"no model '{name}': {error}") from error


@dataclass(frozen=True)
class Cut:
    """What stays of a stored tensor: `kept` indices along dimension `dim`."""

    dim: int
    kept: tuple[int, ...]

    def of(self, tensor: Any) -> Any:
        """A copy of what stays."""
        import torch

        return tensor.index_select(self.dim, torch.tensor(self.kept, dtype=torch.int64))


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of a tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the values."""
        return math.prod(self.shape) * DTYPE_BYTES.get(self.dtype, 1)


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file; a damaged or missing one is an InputError that names it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except QtoolError:
        raise
    except (SafetensorError, FileNotFoundError) as error:
        raise InputError(f"{file} cannot be read (truncated, corrupt or missing): {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order. An index may only name files of its own folder."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    try:
        names = sorted(set(json.loads((folder / WEIGHTS_INDEX).read_text("utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{folder / WEIGHTS_INDEX} is not an index of safetensors files: {error}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{folder / WEIGHTS_INDEX} names {name!r}, which is not a file of this folder")
    return [folder / name for name in names]


def tensor_infos(files: list[Path]) -> dict[str, TensorInfo]:
    """Every tensor in `files` by name, from the headers alone."""
    infos: dict[str, TensorInfo] = {}
    for file in files:
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                part = tensors.get_slice(name)
                infos[name] = TensorInfo(file, part.get_dtype(), tuple(part.get_shape()))
    return infos


def check(folder: Path) -> None:
    """Open every weight file of `folder` once, so that damage is reported before any work."""
    tensor_infos(weight_files(folder))


def load_config(folder: Path) -> Any:
    """The transformers config of `folder`; never remote code. Raises InputError."""
    from transformers import AutoConfig

    try:
        raw = json.loads((folder / "config.json").read_text("utf-8"))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever transformers raises, it is about what the file says
        if '"auto_map"' in (folder / "config.json").read_text("utf-8", errors="replace"):
            raise InputError(f"{folder} needs code of its own to run; qtool never runs remote code") from error
        raise InputError(f"{folder / 'config.json'} cannot be used: {_in_a_line(error)}") from error
    names = raw.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{folder / 'config.json'} names no class in `architectures`; add the class it was trained as")
    return config


def skeleton(config: Any) -> Any:
    """The model class in `config.architectures[0]`, built without memory (on the meta device), in eval mode."""
    import torch
    import transformers

    name = config.architectures[0]
    cls = getattr(transformers, name, None)
    if cls is None:
        raise InputError(f"transformers has no class {name}, which config.json names in `architectures`")
    try:
        with torch.device("meta"):
            return cls(config).eval()
    except Exception as error:  # sizes that do not fit together, mostly
        raise InputError(f"{Path(config.name_or_path) / 'config.json'} cannot be used: {_in_a_line(error)}") from error


def _in_a_line(error: Exception) -> str:
    """The first paragraph of a message."""
    return " ".join(str(error).partition("\n\n")[0].split()) or type(error).__name__


class Checkpoint:
    """The tensors of a float model folder under the names that the model class uses.

    Older checkpoints use other names (LayerNorm's gamma and beta, GPT-NeoX's embed_out), and a base model's tensors may
    carry or lack the prefix of the class; both are resolved as transformers does. A parameter with no tensor is an
    InputError: nothing is ever left to random initialisation. `tied` (default: what `model` ties) names tensors that
    serve for missing ones.
    """

    def __init__(self, folder: Path, model: Any, tied: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.files = weight_files(folder)
        self.infos = tensor_infos(self.files)
        self._stored_as, self._joins = _renamed(model, self.infos)
        self._digest: str | None = None
        self._cuts: Mapping[str, Cut] = {}
        self._names = self._resolve(model, tied_names(model) if tied is None else tied)

    def unties(self, model: Any) -> bool:
        """Whether the files hold tensors that `model` would tie and that differ: transformers then keeps both."""
        for pair in tied_names(model).items():
            names = {name for key in pair if (name := self._spelled(key, model.base_model_prefix)) is not None}
            if len(names) == 2:
                one, other = (self._read(name) for name in names)
                if one.shape != other.shape or not _equal(one, other):
                    return True
        return False

    def _resolve(self, model: Any, tied: Mapping[str, str]) -> dict[str, str]:
        names: dict[str, str] = {}
        missing = []
        for key, slot in model.state_dict().items():
            found = self._spelled(key, model.base_model_prefix) or self._spelled(
                tied.get(key, key), model.base_model_prefix
            )
            if found is None:
                missing.append(key)
            elif self.infos[found].shape != tuple(slot.shape):
                shapes = f"{list(self.infos[found].shape)}, but the config asks for {list(slot.shape)}"
                raise InputError(f"{self.folder}: tensor {found} has shape {shapes}")
            elif slot.is_floating_point() and self.infos[found].dtype not in _FLOATS:
                dtype = self.infos[found].dtype
                raise InputError(f"{self.folder}: tensor {found} has dtype {dtype}; qtool quantizes float checkpoints")
            else:
                names[key] = found
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            if self._joins:
                raise InputError(
                    f"{self.folder} stores {missing[0]}{more} in pieces that transformers joins while loading; "
                    f"such models ({model.config.model_type}) are not supported"
                )
            raise InputError(
                f"{self.folder} lacks weights of {type(model).__name__}: {', '.join(missing[:3])}{more}; "
                "fine-tune or save it as that class first"
            )
        return names

    def _spelled(self, key: str, prefix: str) -> str | None:
        for name in (key, f"{prefix}.{key}", key.removeprefix(f"{prefix}.")):
            if name in self._stored_as:
                return self._stored_as[name]
        return None

    def __call__(self, name: str) -> Any:
        """The tensor for parameter `name` of the model; floats as float32. Raises InputError on NaN or infinity."""
        value = self.stored(name)
        return value.float() if value.is_floating_point() else value

    tensor = __call__

    def stored(self, name: str) -> Any:
        """The same in the dtype of the file, and not in memory but mapped. Raises InputError on NaN or infinity."""
        source = self._names[name]
        value = self._read(source)
        parts = value.flatten().split(_PART) if value.is_floating_point() else ()
        if not all(bool(part.float().isfinite().all()) for part in parts):  # a float64 may be too large for float32
            raise InputError(f"{self.folder}: tensor {source} holds NaN or infinity; this checkpoint is damaged")
        return self._cuts[name].of(value) if name in self._cuts else value

    def cut(self, cuts: Mapping[str, Cut]) -> None:
        """From now on, give of the tensors in `cuts` (parameter names) only what stays, as a copy."""
        self._cuts = cuts

    def info(self, name: str) -> TensorInfo:
        """What the file says of the tensor for parameter `name` of the model."""
        return self.infos[self._names[name]]

    def _read(self, name: str) -> Any:
        with opened(self.infos[name].file) as tensors:
            return tensors.get_tensor(name)

    @property
    def num_bytes(self) -> int:
        """Size of the weight files."""
        return sum(file.stat().st_size for file in self.files)

    def digest(self) -> str:
        """SHA-256 over config.json and every weight file, read once."""
        if self._digest is None:
            files = (self.folder / "config.json", *self.files)
            self._digest = hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest()
        return self._digest


def _equal(one: Any, other: Any) -> bool:
    """Whether two tensors of a shape hold the same values; a part at a time: a mask of a whole table is large."""
    parts = zip(one.flatten().split(_PART), other.flatten().split(_PART), strict=True)
    return all(bool((first == second).all()) for first, second in parts)


def _renamed(model: Any, stored: Iterable[str]) -> tuple[dict[str, str], bool]:
    """The names that transformers gives on loading → those in the files; and whether it also joins or splits any."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    names = {apply_renamings(name, renamings): name for name in stored}
    return names, len(renamings) < len(steps)


def tied_names(model: Any) -> dict[str, str]:
    """Parameters of a transformers model that share the tensor of another one: name → name of the other."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def open_float(folder: Path) -> tuple[Any, Checkpoint]:
    """The skeleton of the model in `folder` and its tensors. Raises InputError, also for a model quantized already.

    A head that the config calls tied, but for which the files hold other values, is untied, as transformers does.
    """
    config = load_config(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{folder} is quantized already (config.json has a quantization_config); pass the float model")
    model = skeleton(config)
    checkpoint = Checkpoint(folder, model)
    if checkpoint.unties(model):
        config.tie_word_embeddings = False
        tied, model = tied_names(model), skeleton(config)
        checkpoint = Checkpoint(folder, model, tied)
    return model, checkpoint


def sha256(file: Path) -> str:
    """Hex digest of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(stream)


def _sha256(stream: Any) -> str:
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
