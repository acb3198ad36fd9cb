"""Proof that a model computes with integers alone: every operation of a whole forward is looked at as it runs."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qtool import artifact, golden
from qtool.errors import InputError
from qtool.kernels import backend, native, using
from qtool.nn.integer.embedding import IntEmbeddings
from qtool.nn.integer.module import integer_outputs


class IntegerOnly(TorchDispatchMode):
    """While active, an operation that reads or makes a tensor of any floating or complex type raises InputError."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Look at the operands, run, look at the results."""
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors((args, kwargs or {}, result)):
            if tensor.is_floating_point() or tensor.is_complex():
                raise InputError(f"not integer-only: {func} touches {tensor.dtype} {list(tensor.shape)}")
        self.operations += 1
        return result


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def run_guarded(model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], int]:
    """The integers that leave `model`, and how many operations made them. Raises InputError at the first float."""
    # Not inference_mode: there composite operations arrive whole, and nobody sees what is inside.
    with torch.no_grad(), integer_outputs(), IntegerOnly() as guard:
        output = model(**inputs, return_dict=True)
    found = {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}
    for name, value in found.items():
        if value.dtype != torch.int32:
            raise InputError(f"not integer-only: {name} is {value.dtype}, not int32")
    return found, guard.operations


def prove(folder: Path) -> str:
    """Run the model in `folder` under the guard. Returns what was found, in words.

    The operations that can be seen are the reference backend's; another backend must give the same integers (that its
    kernels hold no float instruction is a test of qtool's). Raises InputError naming the first operation or tensor that
    is not an integer, or what differs between the backends.
    """
    model = golden.load(folder)
    anchors = {id(module.anchor) for module in model.modules() if isinstance(module, IntEmbeddings)}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    floats = [name for name, tensor in tensors if tensor.is_floating_point() and id(tensor) not in anchors]
    if floats:
        raise InputError(f"{folder} is not integer-only: it holds float tensors such as {floats[0]}")
    inputs, name = _inputs(folder, model), backend().name
    with using("reference"):
        exact, operations = run_guarded(model, inputs)
    proved = f"proved: {operations} operations from token ids to int32 outputs, none of which touches a float"
    if name == "reference":
        return proved
    with torch.no_grad(), integer_outputs():
        found = model(**inputs, return_dict=True)
    for output, wanted in exact.items():
        if not torch.equal(found[output], wanted):
            raise InputError(f"the {name} backend's {output} differs from the reference's; please report this")
    return f"{proved}; the {name} kernels ({native.isa()}) give the same integers"


def _inputs(folder: Path, model: Any) -> dict[str, torch.Tensor]:
    """The recorded golden batch, or, in a re-saved folder, the first ids of the vocabulary, the second row padded."""
    if (folder / artifact.REPORT).is_file():
        return golden.recorded_inputs(folder, artifact.report(folder)["golden"])
    ids = torch.arange(2 * 16).view(2, 16) % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask}
