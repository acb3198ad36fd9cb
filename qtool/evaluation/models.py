"""Loading what is evaluated: a float model or an artifact of qtool, with plain transformers classes, and its tokenizer.

No code of a model is ever run and no pickle opened.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError

from qtool.checkpoint import check, load_config, locate, weight_files
from qtool.errors import InputError, QtoolError, UnavailableError
from qtool.evaluation.exams import exam_class
from qtool.evaluation.tasks import Task

DTYPES = ("float32", "bfloat16", "float16")
"""The types in which float weights can be loaded; integer codes of an artifact stay what they are."""

_VOCABULARIES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model",
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A model folder whose head suits the task, before its weights are loaded; `name` is what the user called it, and
    `loader` the Auto class for it."""

    name: str
    path: Path
    config: Any
    loader: str

    @property
    def probed(self) -> bool:
        """Whether it has no head of its own for the task, and a linear probe reads its features."""
        return self.loader == "AutoModel"

    @property
    def quantized(self) -> bool:
        """Whether the folder holds a quantized model."""
        return getattr(self.config, "quantization_config", None) is not None

    @property
    def size_bytes(self) -> int:
        """Size of its weight files."""
        return sum(file.stat().st_size for file in weight_files(self.path))


def subject(name: str | Path, task: Task, revision: str | None = None) -> Subject:
    """Find a model and see that it can do `task`, reading no weights.

    Raises InputError for a damaged folder or a head for something else, UnavailableError without the hub.
    """
    path = locate(name, revision)
    check(path)
    config = load_config(path)
    return Subject(str(name), path, config, exam_class(task).loader_for(config.architectures[0], task, str(name)))


def load_for(item: Subject, dtype: str = "float32") -> Any:
    """The model of a subject, in eval mode, in the class that its task needs.

    Raises InputError when transformers cannot load it or when a tensor that counts is missing or of another shape.
    """
    import qtool.hf  # noqa: F401 (artifacts of qtool load as ordinary models from here on)

    path, loader = item.path, getattr(transformers, item.loader)
    with _plain_errors(path), _quiet():
        model, report = loader.from_pretrained(
            path,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name: transformers would point to a report that is off
        )
    for key, found, wanted in sorted(report["mismatched_keys"]):
        raise InputError(
            f"{path}: tensor {key} has shape {list(found)}, and the config asks for {list(wanted)}; "
            "restore config.json and the weights of one model"
        )
    # A masked-LM checkpoint has no pooler; the probe does not read it.
    missing = sorted(key for key in report["missing_keys"] if not (item.probed and key.startswith("pooler.")))
    if missing:
        name = type(model).__name__
        raise InputError(f"{path} lacks weights of {name}: {', '.join(missing[:3])}; fine-tune it for this task first")
    return model.eval()


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in `path`; one without padding (GPT-2's, Llama's) pads with its end of text.

    Raises InputError when there is none: transformers would invent a useless one.
    """
    if not any((path / name).is_file() for name in _VOCABULARIES):
        raise InputError(f"{path} has no tokenizer files; copy those of its source (tokenizer.json and others)")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise InputError(f"the tokenizer in {path} cannot be loaded: {_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


@contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except QtoolError:
        raise
    except ImportError as error:
        raise UnavailableError(f"{path} needs a package that is not installed: {_line(error)}") from error
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(f"{path} cannot be loaded: {_line(error)}") from error


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """No bar and no report of transformers while it loads: what the report would say is checked by the caller."""
    log = transformers.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
