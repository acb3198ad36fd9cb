"""A model of random weights from a config alone: for speed, where weights are not to be had. Never for accuracy."""

import json
import shutil
from pathlib import Path

from qtool.checkpoint import TOKENIZER_FILES, load_config
from qtool.errors import InputError


def make(config_folder: Path, folder: Path, seed: int) -> Path:
    """The class in the config's `architectures`, float32, seeded; with the tokenizer where there is one.

    Raises InputError for a folder without a usable config.
    """
    import torch
    import transformers

    if not (config_folder / "config.json").is_file():
        raise InputError(f"{config_folder} has no config.json to make a random model from")
    config = load_config(config_folder)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{config_folder} is the config of a quantized model; pass the float model's")
    kind = getattr(transformers, config.architectures[0], None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise InputError(f"transformers has no model {config.architectures[0]}, which {config_folder} names")
    if not hasattr(config, "vocab_size"):
        raise InputError(f"{config_folder} is the config of a {config.model_type}, which takes no tokens")
    config.dtype = torch.float32
    torch.manual_seed(seed)
    out = folder / f"random-{config_folder.resolve().name}"
    transformers.logging.disable_progress_bar()
    try:
        model = kind(config)
    except (ValueError, TypeError) as error:  # numbers that do not go together
        raise InputError(f"{config_folder}: transformers makes no model of this config: {error}") from error
    model.eval().save_pretrained(out)
    _name_class(out, config.architectures[0])
    for name in TOKENIZER_FILES:
        if (config_folder / name).is_file():
            shutil.copyfile(config_folder / name, out / name)
    return out


def _name_class(folder: Path, name: str) -> None:
    """The class that was asked for, whatever transformers wrote."""
    path = folder / "config.json"
    body = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**body, "architectures": [name]}, indent=2) + "\n", "utf-8")
