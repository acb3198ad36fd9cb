"""What a method is shown of a block: how much rows count, against whole Jacobians, and moments, against sums."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from qtool.lesson import Lesson

MODELS = ["BertForSequenceClassification", "GPT2LMHeadModel", "LlamaForCausalLM"]


def linears(known: Lesson) -> list[str]:
    return list(dict.fromkeys(part.path for part in known.unit.parts))


def entered(known: Lesson, path: str, hidden: torch.Tensor, example: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What a module reads and gives for hidden states, `[tokens, features]` of real tokens, in float64."""
    seen: list[Any] = []
    handle = known.module(path).register_forward_hook(lambda _, given, output: seen.append((given[0], output)))
    with torch.no_grad():
        known.forward(hidden, example.call)
    handle.remove()
    return tuple(one[example.real].double() for one in seen[0])  # type: ignore[return-value]


def exact_sensitivity(known: Lesson, path: str, example: Any) -> torch.Tensor:
    """Σ over all outputs of the squared derivatives by the row of a token, over the norm of the output's token."""
    example = example.normal()
    given = entered(known, path, example.exact, example)[1]
    width = given.shape[-1]

    def outputs(offset: torch.Tensor) -> torch.Tensor:
        handle = known.module(path).register_forward_hook(lambda _, args, output: output + offset)
        found = known.forward(example.exact, example.call)
        handle.remove()
        return found

    zero = torch.zeros(*example.real.shape, width)
    norms = outputs(zero).detach().norm(dim=-1)
    jacobian = torch.autograd.functional.jacobian(outputs, zero)  # [texts, tokens, hidden, texts, tokens, width]
    squares = (jacobian / norms[..., None, None, None, None]).square() * example.real[..., None, None, None, None]
    found: torch.Tensor = squares.sum((0, 1, 2)).mean(-1)[example.real]
    return found


@pytest.mark.parametrize("architecture", MODELS)
def test_rows_count_by_the_jacobian(architecture: str, lesson: Any) -> None:
    """One random direction an output is a noisy estimate, whose mean over many is the value."""
    with lesson(architecture, batches=1) as known:
        paths = linears(known)
        draws = [known.sensitivities(paths) for _ in range(150)]
        for path in paths:
            wanted = exact_sensitivity(known, path, known.examples[0])
            rows = torch.stack([draw[path][0] for draw in draws])
            assert rows.mean(1).allclose(torch.ones(150))
            found = rows.mean(0)
            assert torch.corrcoef(torch.stack([found, wanted]))[0, 1] > 0.97 or wanted.std() < 0.1 * wanted.mean()
            torch.testing.assert_close(found, wanted / wanted.mean(), rtol=0.35, atol=0.05)


@pytest.mark.parametrize("architecture", MODELS)
def test_moments_are_weighted_sums(architecture: str, lesson: Any) -> None:
    with lesson(architecture, batches=3) as known:
        paths = linears(known)
        counts = known.sensitivities(paths)
        for stage in known.stages(paths):
            found = known.moments(stage, {}, counts)
            assert list(found) == stage
            for path in stage:
                own = cross = torch.zeros(1, dtype=torch.float64)
                for example, rows in zip(known.examples, counts[path], strict=True):
                    x, y = (entered(known, path, one, example)[0] for one in (example.exact, example.lowered))
                    own = own + (y * rows.double()[:, None]).t() @ y
                    cross = cross + (y * rows.double()[:, None]).t() @ x
                torch.testing.assert_close(found[path].own, own, rtol=1e-4, atol=1e-4 * float(own.abs().max()))
                torch.testing.assert_close(found[path].cross, cross, rtol=1e-4, atol=1e-4 * float(own.abs().max()))


def test_padding_counts_nothing(lesson: Any) -> None:
    """Whatever stands at padded positions, rows of real tokens count the same."""
    with lesson(batches=2) as known:
        paths = linears(known)
        assert not all(bool(example.real.all()) for example in known.examples)
        torch.manual_seed(1)
        before = known.sensitivities(paths)
        known.examples = [
            replace(one, exact=torch.where(one.real[..., None], one.exact, 3.0)) for one in known.examples
        ]
        torch.manual_seed(1)
        after = known.sensitivities(paths)
    for path in paths:
        for rows, others, example in zip(before[path], after[path], known.examples, strict=True):
            assert len(rows) == int(example.real.sum())
            torch.testing.assert_close(rows, others)


def test_a_matrix_that_nothing_hangs_on_counts_evenly(lesson: Any) -> None:
    """A block whose second half multiplies by zero: no gradient, no division by zero."""
    with lesson(batches=2) as known:
        paths = linears(known)
        known.module(paths[-1]).weight = torch.nn.Parameter(torch.zeros_like(known.module(paths[-1]).weight))
        found = known.sensitivities(paths)
        assert all(torch.equal(rows, torch.ones_like(rows)) for rows in found[paths[-2]])
        assert all(rows.isfinite().all() and (rows >= 0).all() for path in paths for rows in found[path])


@pytest.mark.parametrize("size", [0.0, 1e-6])
def test_a_silent_token_does_not_count_more_than_all_others(size: float, lesson: Any) -> None:
    """A token whose embedding is untrained: over its own norm, its row would be infinite, or all there is."""
    with lesson("LlamaForCausalLM", batches=2) as known:
        paths = linears(known)
        scale = torch.ones(known.examples[0].exact.shape[:2])
        scale[0, 0] = size
        known.examples = [replace(one, exact=one.exact * scale[..., None]) for one in known.examples]
        found = known.sensitivities(paths)
    for path in paths:
        rows = torch.cat(found[path])
        assert rows.isfinite().all() and float(rows.mean()) == pytest.approx(1, rel=1e-5)
        assert float(rows.max()) < 0.75 * len(rows)


def test_a_module_that_is_called_twice_counts_by_the_first_call(lesson: Any) -> None:
    """As that of DeBERTa, which projects positions too: what rounding sees of inputs is those of the first call."""
    with lesson(batches=1) as known:
        paths, example = linears(known), known.examples[0]
        torch.manual_seed(1)
        wanted = known.sensitivities(paths)
        path, later = (next(one for one in paths if one.endswith(name)) for name in ("query", "attention.output.dense"))

        def once_more(module: Any, given: Any) -> None:
            known.module(path)(given[0][:, :1])

        handle = known.module(later).register_forward_pre_hook(once_more)
        torch.manual_seed(1)
        found = known.sensitivities(paths)
        handle.remove()
        assert len(found[path][0]) == int(example.real.sum())
        assert all(torch.equal(found[one][0], wanted[one][0]) for one in paths)


def test_a_block_that_pads_its_input(lesson: Any) -> None:
    """Longformer pads texts to its window; nobody knows where in what it gives padding is, and all rows count."""
    with lesson("LongformerForMaskedLM", batches=2, attention_window=8, max_position_embeddings=64) as known:
        assert any(example.real.shape[1] % 8 for example in known.examples)
        found = known.sensitivities(linears(known))
    reached = [rows for path in found for rows in found[path] if len(rows)]  # nothing attends globally
    assert len(reached) >= 2 * 6 and all(rows.isfinite().all() and len(rows) % 8 == 0 for rows in reached)


def test_a_block_without_matrices(lesson: Any) -> None:
    """One that a rule keeps in float is asked for nothing."""
    with lesson(batches=2) as known:
        assert known.sensitivities([]) == {}
