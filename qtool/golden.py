"""The golden batch: a few inputs whose outputs were recorded while quantizing, computed again from the saved model.

`python -m qtool.golden FOLDER EXPECTED.safetensors` is what the pipeline runs in a fresh process before it publishes:
a model that does not reload to the same numbers is never put in place. It is loaded as users load it, whatever its
size: what transformers loads is the files themselves, mapped, and the system drops and reads pages as it likes.
"""

import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qtool.errors import InputError
from qtool.nn.integer.embedding import IntEmbeddings
from qtool.nn.module import fleeting_operands
from qtool.nn.plan import one_by_one

SEQUENCES, TOKENS = 4, 32
GROSS = 0.1
"""Relative L2 error from which another machine's outputs count as damage. Floats that round differently flip activation
codes here and there: 0.035 was measured on the logits of an intact model."""
_AT_ONCE = 1 << 20  # values that are compared in float64
_KEPT = 256  # values of each output: enough to tell damage from rounding, and a few kilobytes


def load(folder: Path) -> Any:
    """The model in `folder`, loaded as users load it, by the class in its config."""
    import transformers

    import qtool  # noqa: F401 (registers the plug-in)
    from qtool.checkpoint import load_config

    name = load_config(folder).architectures[0]
    cls = getattr(transformers, name, None)
    if cls is None:
        raise InputError(f"transformers has no class {name}, which {folder / 'config.json'} names in `architectures`")
    transformers.utils.logging.disable_progress_bar()
    model = cls.from_pretrained(folder, trust_remote_code=False, use_safetensors=True).eval()
    model.config.use_cache = False  # a cache changes the masks, and with them how floats are rounded
    return model


def compute(folder: Path, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs of the model in `folder`. Raises InputError when kernels that join modules compute something else.

    Float modules run one by one, so that no kernel's order of operations is recorded; joined ones may be off by
    `GROSS`, as on another machine. Integers are the same either way. Tensors stay mapped from the files and what a
    product makes of its codes is dropped again, so that models larger than memory are checked too.
    """
    model = load(folder)
    with fleeting_operands():
        with one_by_one():
            outputs = _run(model, inputs)
        again = _run(model, inputs)
    exact = isinstance(getattr(model.base_model, "embeddings", None), IntEmbeddings)
    for name, joined in again.items():
        wanted = _real(outputs[name], inputs)
        off = _relative_error(_real(joined, inputs), wanted.flatten())
        if off > (0.0 if exact else GROSS):
            raise InputError(f"{folder}: {name} of the joined kernels is off by {off:.2%}; please report this")
    return outputs


def _real(output: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What stands at tokens that are not padding: joined kernels compute nothing else."""
    mask = inputs.get("attention_mask")
    return output if mask is None or output.shape[:2] != mask.shape else output[mask.bool()]


def _run(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        output = model(**inputs, return_dict=True)
    return {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}


def record(inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """JSON-clean: the inputs whole; of each output its shape, SHA-256 and first values."""
    return {
        "inputs": {name: value.tolist() for name, value in inputs.items()},
        "outputs": {
            name: {
                "shape": list(value.shape),
                "sha256": _digest(value),
                "first": value.flatten()[:_KEPT].tolist(),
            }
            for name, value in outputs.items()
        },
    }


def _digest(value: torch.Tensor) -> str:
    return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()


def differences(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> list[str]:
    """One line for each output that is not equal, bit for bit."""
    lines = []
    for name, want in expected.items():
        have = found.get(name)
        if have is None or have.shape != want.shape:
            lines.append(f"{name}: missing or of another shape")
        elif not torch.equal(have, want):
            lines.append(f"{name}: differs by up to {(have.double() - want.double()).abs().max().item():.3g}")
    return lines


@dataclass(frozen=True)
class Recheck:
    """How a recorded golden batch compares: `verdict` in words, and a line of `damage` for each output that is off."""

    verdict: str
    damage: list[str]


def recheck(folder: Path, recorded: Mapping[str, Any], *, same_machine: bool) -> Recheck:
    """Compute a recorded golden batch again.

    On the same machine (instruction set, threads, versions) every output must have the recorded SHA-256. Elsewhere
    floats round differently, and the values that were kept may be off by a relative L2 error of `GROSS`.
    Raises InputError when the record is damaged or the model cannot compute it.
    """
    inputs, wanted = _read(folder, recorded)
    try:
        outputs = compute(folder, inputs)
    except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder} cannot compute its golden batch: {said}") from error
    damage: list[str] = []
    largest: float | None = None
    for name, want in wanted.items():
        have = outputs.get(name)
        if have is None or list(have.shape) != want["shape"]:
            damage.append(f"{name}: missing or of another shape than in the golden batch")
            continue
        equal, off = _digest(have) == want["sha256"], _relative_error(have, want["first"])
        if (same_machine and not equal) or not (equal or off <= GROSS):
            damage.append(f"{name}: differs from the recorded golden batch by {off:.2%} of its values' size")
        largest = largest if equal else max(largest or 0.0, off)
    if damage or largest is None:
        return Recheck("differs" if damage else "agrees", damage)
    return Recheck(f"agrees within {largest:.2%} (made on another CPU, thread count or version)", damage)


def recorded_inputs(folder: Path, recorded: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The inputs of a recorded golden batch. Raises InputError when the record is damaged."""
    return _read(folder, recorded)[0]


def _relative_error(found: torch.Tensor, first: Sequence[float] | torch.Tensor) -> float:
    """`|found - first| / |first|` in the L2 norm over the values that were kept; infinite when any is not finite."""
    want = first if isinstance(first, torch.Tensor) else torch.tensor(first, dtype=torch.float64)
    have = found.flatten()[: len(first)]
    if len(want) != len(have):
        return math.inf
    off = size = 0.0
    for exact, value in zip(want.split(_AT_ONCE), have.split(_AT_ONCE), strict=True):
        exact, value = exact.double(), value.double()
        if not (exact.isfinite().all() and value.isfinite().all()):
            return math.inf
        off += (value - exact).square().sum().item()
        size += exact.square().sum().item()
    return math.sqrt(off) / max(math.sqrt(size), torch.finfo(torch.float32).tiny) if off else 0.0


def _read(folder: Path, recorded: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], Mapping[str, Any]]:
    """Inputs as tensors and the recorded outputs. Raises InputError when they are not what `record` makes."""
    where = f"{folder}: the golden batch in the report is damaged"
    given, outputs = recorded.get("inputs"), recorded.get("outputs")
    if not isinstance(given, dict) or not isinstance(outputs, dict) or not given or not outputs:
        raise InputError(f"{where}: it has no inputs or no outputs")
    if not all(_is_output(want) for want in outputs.values()):
        raise InputError(f"{where}: an output has no shape, SHA-256 or first values")
    try:
        inputs = {name: torch.tensor(value) for name, value in given.items()}
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{where}: its inputs are no numbers in rows of one length") from error
    if any(value.dtype != torch.int64 or value.ndim != 2 for value in inputs.values()):
        raise InputError(f"{where}: its inputs are not whole numbers in rows")
    return inputs, outputs


def _is_output(want: Any) -> bool:
    if not isinstance(want, dict) or not isinstance(want.get("shape"), list) or not isinstance(want.get("sha256"), str):
        return False
    first = want.get("first")
    return isinstance(first, list) and bool(first) and all(isinstance(value, float) for value in first)


def main() -> int:
    """Exit status 0 when equal; otherwise the differences on stderr and 3."""
    from qtool.checkpoint import opened

    folder, expected_file, threads = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    with opened(expected_file) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    inputs = {name.removeprefix("in."): value for name, value in tensors.items() if name.startswith("in.")}
    expected = {name.removeprefix("out."): value for name, value in tensors.items() if name.startswith("out.")}
    lines = differences(expected, compute(folder, inputs))
    print("; ".join(lines), file=sys.stderr)
    return InputError.exit_code if lines else 0


if __name__ == "__main__":
    sys.exit(main())
