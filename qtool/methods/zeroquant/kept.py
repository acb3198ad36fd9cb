"""What stays float, and why."""

from typing import Any

from qtool.anatomy import Anatomy, matrix_kind
from qtool.errors import InputError


def irreplaceable(anatomy: Anatomy, model: Any, path: str) -> str | None:
    """Why codes cannot stand for the module at `path`: it, or an output layer that shares it, computes its own way."""
    sharing = [anatomy.tied_head] if anatomy.tied_head and path == anatomy.word_table else []
    for other in (path, *sharing):
        module = model.get_submodule(other)
        if matrix_kind(module) is None:
            return f"{type(module).__name__}{f' ({other})' * (other != path)}: its forward is not the plain one"
    return None


def vocabulary_head(anatomy: Anatomy, model: Any) -> str:
    """The path of the output layer over the vocabulary. Raises InputError where it has no matrix of its own."""
    wanted = "methods.zeroquant.head"
    if anatomy.tied_head:
        raise InputError(f"{wanted}: {anatomy.tied_head} shares the word table and its codes; see word_embeddings")
    module = model.get_output_embeddings()
    paths: list[str] = [path for path, found in model.named_modules() if found is module]
    path = paths[0] if paths else None
    if path is None or matrix_kind(module) is None:
        raise InputError(
            f"{wanted}: {type(model).__name__} has no plain output layer over a vocabulary; leave it float"
        )
    return path


def float_rest(anatomy: Anatomy, model: Any, modules: Any) -> dict[str, str]:
    """Why what is left stays float."""
    reasons = {}
    parts = {part.path for _, part in anatomy.parts()}
    for path, module in model.named_modules():
        weights = [weight for _, weight in module.named_parameters(recurse=False)]
        if path in modules or path in parts or not weights:
            continue
        if anatomy.head.owns(path):
            reasons[path] = "head: small, and its error reaches the logits undamped"
        elif all(weight.dim() < 2 for weight in weights):
            reasons[path] = "normalisation: a vector of weights, computed in float"
        elif anatomy.embeddings.owns(path):
            reasons[path] = "beside the word table: small, and its error reaches every block"
        else:
            reasons[path] = f"{type(module).__name__}: its weights are not those of a Linear"
    return reasons
