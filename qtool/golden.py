"""The golden batch: a few inputs whose outputs were recorded while quantizing, computed again from the saved model.

`python -m qtool.golden FOLDER EXPECTED.safetensors` is what the pipeline runs in a fresh process before it publishes:
a model that does not reload to the same numbers is never put in place.
"""

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qtool.errors import InputError

SEQUENCES, TOKENS = 4, 32
_SHOWN = 8


def compute(folder: Path, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs of the model in `folder`, loaded as users load it, by the class in its config."""
    import transformers

    import qtool  # noqa: F401 (registers the plug-in)
    from qtool.checkpoint import load_config

    cls = getattr(transformers, load_config(folder).architectures[0])
    transformers.utils.logging.disable_progress_bar()
    model = cls.from_pretrained(folder, trust_remote_code=False, use_safetensors=True).eval()
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
                "sha256": hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest(),
                "first": value.flatten()[:_SHOWN].tolist(),
            }
            for name, value in outputs.items()
        },
    }


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


def recheck(folder: Path, recorded: Mapping[str, Any]) -> list[str]:
    """Compute a recorded golden batch again. Values must agree to 1e-3: other machines round floats differently."""
    inputs = {name: torch.tensor(value) for name, value in recorded["inputs"].items()}
    outputs = compute(folder, inputs)
    lines = []
    for name, want in recorded["outputs"].items():
        have = outputs[name].flatten()[:_SHOWN].tolist()
        worst = max((abs(a - b) for a, b in zip(have, want["first"], strict=True)), default=0.0)
        if not worst <= 1e-3 * max(1.0, *map(abs, want["first"])):
            lines.append(f"{name}: differs from the recorded golden batch by {worst:.3g}")
    return lines


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
