"""Tiny quantized models on the native backend, and what is needed to watch their blocks being joined in few calls."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import qtool
from qtool import kernels
from qtool.kernels import integer, native
from qtool.nn.integer.module import integer_outputs

Batch = dict[str, torch.Tensor]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = pytest.mark.skipif(not native.available(), reason=native.reason() or "")
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(missing)


class Models:
    """Fresh copies of tiny quantized models, which lie in `shelf`, and how they are asked."""

    def __init__(self, shelf: Any) -> None:
        self._shelf = shelf
        self._folder = functools.cache(self._make)

    def __call__(
        self, architecture: str = "BertForSequenceClassification", method: str = "ibert", *entries: str, **config: Any
    ) -> Any:
        """A model by its class, the method, entries of the recipe and options of the config."""
        path = self._folder(architecture, method, entries, tuple(config.items()))
        name = json.loads((path / "config.json").read_text())["architectures"][0]
        return getattr(transformers, name).from_pretrained(path).eval()

    def _make(self, architecture: str, method: str, entries: tuple[str, ...], config: tuple[Any, ...]) -> Path:
        name = f"joined-{len(list(self._shelf.folder.iterdir()))}"
        options: dict[str, Any] = {"max_position_embeddings": 200, **dict(config)}
        if "Classification" in architecture:
            options["labels"] = ("a", "b", "c")
        source = self._shelf.make(name, architecture, change=self._shelf.noise(0.1), **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self._shelf.folder)
            patch.setattr("qtool.pipeline._check_in_fresh_process", lambda *run: None)  # it takes seconds
            recipe = ["calibration.source=random", "calibration.num_samples=4", "calibration.max_length=12", *entries]
            result = qtool.quantize(str(source), method=method, output=self._shelf.folder / f"{name}-out", set=recipe)
        return Path(result.path)

    @staticmethod
    def batch(model: Any, rows: int, tokens: int, padding: str = "holes") -> Batch:
        """Random tokens for `model`, `[rows, tokens]`, of which `padding` says where there are none."""
        draw = torch.Generator().manual_seed(rows * tokens)
        ids = torch.randint(5, model.config.vocab_size, (rows, tokens), generator=draw)
        lengths, at = torch.randint(1, tokens + 1, (rows, 1), generator=draw), torch.arange(tokens)
        holes = torch.rand((rows, tokens), generator=draw) > 0.1
        masks = {
            "none": torch.ones_like(holes),
            "right": at < lengths,
            "left": at >= tokens - lengths,
            "holes": holes,
            "ragged": holes & (at < lengths) & (at >= lengths // 4),
            "one empty": holes & (torch.arange(rows) != rows // 2)[:, None],
            "all": torch.zeros_like(holes),
        }
        mask = masks[padding].expand_as(ids)
        return {"input_ids": torch.where(mask, ids, model.config.pad_token_id), "attention_mask": mask.long()}

    @staticmethod
    def integers(model: Any, inputs: Batch) -> list[torch.Tensor]:
        """Logits and the last hidden state of an integer model as it makes them, before anything becomes float."""
        with integer_outputs():
            output, hidden = model(**inputs), model.base_model(**inputs).last_hidden_state
        return [output.logits, hidden]


@pytest.fixture(scope="module")
def load(shelf: Any) -> Models:
    return Models(shelf)


@pytest.fixture(autouse=True)
def natively(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On the native backend, and with as many threads as torch has even for the little that tiny models do."""
    monkeypatch.setattr(integer, "_ALONE", -1)
    with kernels.using("native"), torch.no_grad():
        yield


@pytest.fixture(params=native.ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param not in native.isas():
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setattr(native, "isa", lambda: request.param)
    return str(request.param)


class Calls(list[str]):
    """Names of the library's functions as they are called, and with how many threads."""

    def __init__(self) -> None:
        self.threads: list[int] = []

    def clear(self) -> None:
        super().clear()
        self.threads.clear()

    def threads_of(self, name: str) -> list[int]:
        return [threads for called, threads in zip(self, self.threads, strict=True) if called == name]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    seen, call = Calls(), native.call

    def noted(name: str, *given: Any) -> Any:
        seen.append(name)
        seen.threads.append(given[-1])
        return call(name, *given)

    monkeypatch.setattr(native, "call", noted)
    return seen
