"""Models on an emulated GPU: loaded, moved there and back, scored and studied."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_cuda import GPU, emulated_cuda
from small_models import ATTENDING, DATA, golden_check_here, load, outputs, save
from small_models import batch as five_texts
from transformers import AutoModelForSequenceClassification

import qtool
from qtool.api import AttentionRequest, HeadsRequest, analyze_attention, analyze_heads
from qtool.errors import UnavailableError
from qtool.kernels import using

BERT, LLAMA = "BertForSequenceClassification", "LlamaForCausalLM"


def quantized(folder: Path, source: Path, *methods: str, sets: tuple[str, ...] = ()) -> Path:
    with golden_check_here(folder):
        return qtool.quantize(str(source), method=methods, set=(*DATA, *sets), output=folder / "out").path


@pytest.fixture(scope="module")
def integer(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny classifier in integers."""
    return quantized(tmp_path_factory.mktemp("device"), tiny.model, "ibert")


def test_evaluation_gives_the_same_scores(integer: Path, tiny: Any) -> None:
    options: dict[str, Any] = {"data": str(tiny.data), "baseline": str(tiny.model)}
    wanted = qtool.evaluate(integer, "sst2", **options)
    with emulated_cuda() as gpu:
        found = qtool.evaluate(integer, "sst2", device="cuda", **options)
        assert gpu.operations > 1000 and gpu.waits == 2 * 2 * 2  # before and behind each of two batches of both models
    for name in ("drop", "agreement", "kl", "interval", "predictions", "n"):
        assert getattr(found, name) == getattr(wanted, name), name
    assert found.baseline and wanted.baseline
    assert (found.candidate.value, found.baseline.value) == (wanted.candidate.value, wanted.baseline.value)
    assert found.settings == {**wanted.settings, "device": "cuda:0 (Emulated GPU)"}
    assert wanted.settings["device"] == "cpu"


def rows_of(task: str, zoo: Any) -> list[dict[str, Any]]:
    """Twelve examples of a kind of task."""
    texts = zoo.sentences(12, seed=3)
    if task == "squad":
        return [{"question": "w1 w2", "context": f"w7 {text}", "answers": ["w7"]} for text in texts]
    if task == "token-classification":
        words = [text.split() for text in texts]
        return [{"tokens": own, "ner_tags": ["B-PER" if word < "w3" else "O" for word in own]} for own in words]
    return [{"sentence": text, "text": text, "label": index % 2} for index, text in enumerate(texts)]


TASKS = {
    "squad": "BertForQuestionAnswering",
    "token-classification": "BertForTokenClassification",
    "masked-lm": "BertForMaskedLM",
    "perplexity": "GPT2LMHeadModel",
    "sst2": "BertModel",
}


@pytest.mark.parametrize("task", TASKS)
def test_every_kind_of_task_is_scored(zoo: Any, task: str) -> None:
    options: dict[str, Any] = {"labels": ("O", "B-PER")} if task == "token-classification" else {}
    model = (zoo.causal if task == "perplexity" else zoo.make)("float", TASKS[task], **options)
    for split in ("train", "validation", "test"):
        zoo.table(f"data/{split}.jsonl", rows_of(task, zoo))
    asked: dict[str, Any] = {"data": str(zoo.folder / "data"), "baseline": str(model), "allow_weak_baseline": True}
    asked |= {"max_length": 8} if task == "perplexity" else {}
    wanted = qtool.evaluate(model, task, **asked)
    with emulated_cuda() as gpu:
        found = qtool.evaluate(model, task, device="cuda", **asked)
        assert gpu.operations > 100
    assert found.predictions == wanted.predictions and found.candidate.value == wanted.candidate.value
    assert found.kl == 0.0


MADE: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    (BERT, ("ibert",), ()),
    ("BertModel", ("ibert",), ()),
    ("DistilBertForMaskedLM", ("ibert",), ()),
    (BERT, ("zeroquant",), ()),
    (LLAMA, ("zeroquant", "logattn"), ("weights.spec=int4:group:16",)),
    ("GPT2LMHeadModel", ("zeroquant",), ("methods.zeroquant.attention=int8",)),
]


@pytest.mark.parametrize(("architecture", "methods", "sets"), MADE)
def test_models_go_to_the_gpu_and_back(
    tmp_path: Path, architecture: str, methods: tuple[str, ...], sets: tuple[str, ...]
) -> None:
    source = save(tmp_path / "float", architecture, **ATTENDING.get(architecture, {}))
    folder, texts = quantized(tmp_path, source, *methods, sets=sets), five_texts()
    model = load(folder)
    with using("reference"):
        wanted = outputs(model, texts)
    joined = outputs(model, texts)
    with emulated_cuda() as gpu:
        there = {name: value.to("cuda") for name, value in texts.items()}
        model.to("cuda")
        assert places(model) == {GPU} == {model.device} and kept(model) == []
        assert torch.equal(outputs(model, there).cpu(), wanted) and gpu.operations > 100
        loaded = load(folder, device_map="cuda")
        assert places(loaded) == {GPU} == {loaded.device}
        assert torch.equal(outputs(loaded, there).cpu(), wanted)
        assert load(folder, device_map="auto").device == GPU
        model.to("cpu")
    assert torch.equal(outputs(model, texts), joined)


def places(model: Any) -> set[torch.device]:
    return {value.device for value in (*model.parameters(), *model.buffers())}


def kept(model: Any) -> list[str]:
    """Modules with a plan or an operand, which hold tensors that have left."""
    known = ((path, vars(module).get(name)) for path, module in model.named_modules() for name in ("_plan", "_operand"))
    return [path for path, value in known if value is not None]


def test_what_a_model_recorded_goes_when_it_moves(integer: Path) -> None:
    model = load(integer)
    vars(model)["_plan"] = vars(model.bert)["_plan"] = "a graph that was recorded on a GPU"
    model.to("cpu")
    assert kept(model) == []


def test_half_of_it_on_the_gpu_is_no_use(integer: Path) -> None:
    with emulated_cuda():
        model = AutoModelForSequenceClassification.from_pretrained(integer, device_map="cuda").eval()
        with pytest.raises(RuntimeError, match="same device"):
            model(**five_texts())  # the batch stayed behind
        with pytest.raises(UnavailableError, match="device_map asks for cuda:3: there are only cuda:0 to cuda:0 here"):
            AutoModelForSequenceClassification.from_pretrained(integer, device_map={"": 3})


def test_attention_is_studied(tiny: Any, tmp_path: Path) -> None:
    request = AttentionRequest(thresholds=(1e-2,), bits=(3,), exam={"data": str(tiny.data)})
    wanted = analyze_attention(tiny.model, "sst2", tmp_path / "cpu", request)
    with emulated_cuda() as gpu:
        found = analyze_attention(tiny.model, "sst2", tmp_path / "cuda", replace(request, device="cuda"))
        assert gpu.operations > 1000
    assert found["distribution"] == wanted["distribution"]
    told = ("score", "drop", "agreement", "kl", "zeros", "pairs")
    points = [[[point[name] for name in told] for point in body["points"]] for body in (found, wanted)]
    assert points[0] == points[1] and len(points[0]) > 2
    here, there = wanted["fingerprint"], found["fingerprint"]
    assert there == {**here, "instruction set": f"{here['instruction set']} + Emulated GPU 9.0 CUDA 13.0"}


@pytest.mark.parametrize(("metric", "search"), [("score", "gradient"), ("kl", "greedy")])
def test_heads_are_searched(tiny: Any, tmp_path: Path, metric: str, search: str) -> None:
    request = HeadsRequest(metric=metric, search=search, data=str(tiny.data), max_evaluations=6)
    wanted = analyze_heads(tiny.model, "sst2", tmp_path / "cpu", request)
    with emulated_cuda() as gpu:
        found = analyze_heads(tiny.model, "sst2", tmp_path / "cuda", replace(request, device="cuda"))
        assert gpu.operations > 500
    apart = {name for name in wanted if found[name] != wanted[name]}
    assert apart == {"fingerprint"} and "Emulated GPU" in found["fingerprint"]["instruction set"]
