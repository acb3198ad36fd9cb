"""Perplexity against a sum in float64 by plain transformers, masked tokens against a loop."""

import csv
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scipy.special import rel_entr, softmax

from qtool.errors import InputError, UsageError
from qtool.evaluation.exams.base import Request
from qtool.evaluation.exams.language import MaskedLanguage
from qtool.evaluation.gate import Gate
from qtool.evaluation.result import Evaluation, write_predictions
from qtool.evaluation.runner import evaluate, options_for
from qtool.evaluation.tasks import task

ANY, WIKITEXT, MASKED = task("perplexity"), task("wikitext-2"), task("masked-lm")
Find = Callable[[str], Path]


def text_of(words: int, seed: int = 0) -> str:
    """Lines of random words."""
    draw = random.Random(seed)
    lines = [" ".join(f"w{draw.randrange(60)}" for _ in range(5)) for _ in range(words // 5)]
    return "\n".join(lines) + "\n"


def written(zoo: Any, text: str, name: str = "text.txt") -> Path:
    path: Path = zoo.folder / name
    path.write_text(text)
    return path


def summed(folder: Path, text: str, window: int, stride: int, limit: int | None = None) -> tuple[float, int]:
    """Perplexity and scored tokens, the sliding window as transformers documents it, but for a last partial step."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval().double()
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    total, count, before, windows = 0.0, 0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + window, ids.shape[1])
        if (begin and end - begin < window) or windows == limit:
            break
        row = ids[:, begin:end]
        with torch.no_grad():
            odds = model(input_ids=row).logits[0].log_softmax(-1)
        for place in range(max(before - begin, 1), end - begin):
            total -= float(odds[place - 1, row[0, place]])
            count += 1
        before, windows = end, windows + 1
    return math.exp(total / count), count


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "LlamaForCausalLM"])
@pytest.mark.parametrize(("window", "stride"), [(None, None), (16, None), (16, 16), (16, 5), (16, 1), (10, 40), (2, 1)])
def test_numbers_are_those_of_a_sum_in_float64(
    zoo: Any, architecture: str, window: int | None, stride: int | None
) -> None:
    model, text = zoo.causal("m", architecture), text_of(190)
    length = window or 40
    wanted, count = summed(model, text, length, min(stride or length, length))
    found = [
        evaluate(model, ANY, data=written(zoo, text), max_length=window, stride=stride, batch_size=size)
        for size in (None, 1, 3)
    ]
    for result in found:
        assert (result.n, result.unit, result.metric) == (count, "tokens", "perplexity")
        assert result.candidate.value == pytest.approx(wanted, rel=1e-5)
        assert result.candidate.value == pytest.approx(found[0].candidate.value, rel=1e-6)
        assert result.settings["max_length"] == length
    rows = found[0].predictions
    assert sum(row["tokens"] for row in rows) == count
    mean = sum(row["tokens"] * row["candidate"] for row in rows) / count
    assert math.exp(mean) == pytest.approx(wanted, rel=1e-5)


def test_how_many_tokens_are_scored(zoo: Any) -> None:
    model, data = zoo.causal("m"), written(zoo, "w1 " * 100)
    for window, stride, count in (
        (40, None, 2 * 39),  # 20 tokens are left over, and the first of each window has no context
        (40, 40, 2 * 39),
        (40, 10, 39 + 6 * 10),
        (40, 39, 39 + 39),
        (20, 7, 19 + 11 * 7),
        (10, 1, 99),
    ):
        assert evaluate(model, ANY, data=data, max_length=window, stride=stride).n == count
    assert evaluate(model, ANY, data=data, max_length=10, stride=5, limit=4).n == 9 + 3 * 5
    assert evaluate(model, ANY, data=data, max_length=10, limit=1000).n == 90


def test_a_shorter_stride_gives_every_token_all_context(zoo: Any) -> None:
    model, text = zoo.causal("m"), text_of(30)
    plain = transformers.AutoModelForCausalLM.from_pretrained(model).eval().double()
    ids = transformers.AutoTokenizer.from_pretrained(model)(text, return_tensors="pt")["input_ids"]
    total = 0.0
    for place in range(1, ids.shape[1]):
        with torch.no_grad():
            total -= float(
                plain(input_ids=ids[:, max(0, place - 11) : place]).logits[0, -1].log_softmax(-1)[ids[0, place]]
            )
    result = evaluate(model, ANY, data=written(zoo, text), max_length=12, stride=1)
    assert result.candidate.value == pytest.approx(math.exp(total / (ids.shape[1] - 1)), rel=1e-5)


def test_texts_shorter_than_a_window(zoo: Any) -> None:
    model = zoo.causal("m")
    result = evaluate(model, ANY, data=written(zoo, "w1 w2 w3"))
    assert result.n == 2
    assert result.candidate.value == pytest.approx(summed(model, "w1 w2 w3", 40, 40)[0], rel=1e-5)
    with pytest.raises(InputError, match=r"text\.txt gives 1 tokens in windows of 40: at least two"):
        evaluate(model, ANY, data=written(zoo, "w1"))
    with pytest.raises(UsageError, match="a window must have at least 2 tokens"):
        evaluate(model, ANY, data=written(zoo, "w1 w2 w3"), max_length=1)


def test_a_token_before_the_text_is_context_and_not_scored(zoo: Any) -> None:
    with_bos, without = zoo.causal("bos", bos=True), zoo.causal("plain")
    data = written(zoo, "w1 w2 w3")
    assert (evaluate(with_bos, ANY, data=data).n, evaluate(without, ANY, data=data).n) == (3, 2)
    model = transformers.AutoModelForCausalLM.from_pretrained(with_bos).eval().double()
    row = torch.tensor([[2, 5 + 1, 5 + 2, 5 + 3]])
    with torch.no_grad():
        odds = model(input_ids=row).logits[0].log_softmax(-1)
    wanted = math.exp(-sum(float(odds[place, row[0, place + 1]]) for place in range(3)) / 3)
    assert evaluate(with_bos, ANY, data=data).candidate.value == pytest.approx(wanted, rel=1e-5)
    # Only the first window of a longer text has it.
    text = text_of(99)
    assert evaluate(with_bos, ANY, data=written(zoo, text), max_length=10).candidate.value == pytest.approx(
        summed(with_bos, text, 10, 10)[0], rel=1e-5
    )


def test_rows_of_a_text_are_the_text(zoo: Any) -> None:
    """The byte-level model reads line ends too, so that a lost empty line shows."""
    text = "\n = Head = \n\n one two\nthree \n\n\nfour five six\n"
    model = zoo.byte_level("m", "GPT2LMHeadModel", text * 2, bos_token_id=2, eos_token_id=3)
    whole = evaluate(model, ANY, data=written(zoo, text))
    lines = text.splitlines()
    for name, rows in (
        ("plain.jsonl", [{"text": line} for line in lines]),
        ("ended.jsonl", [{"text": f"{line}\n"} for line in lines]),
        ("other.jsonl", [{"body": line, "text": "no"} for line in lines]),
    ):
        given = {"text_columns": ["body"]} if name == "other.jsonl" else {}
        result = evaluate(model, ANY, data=zoo.table(name, rows), **given)
        assert (result.n, result.candidate.value) == (whole.n, whole.candidate.value)
    (zoo.folder / "folder").mkdir()
    written(zoo, text, "folder/test.txt")
    written(zoo, "no no no", "folder/validation.txt")
    result = evaluate(model, WIKITEXT, data=zoo.folder / "folder")
    assert (result.split, result.candidate.value) == ("test", whole.candidate.value)


def nothing(model: Any) -> None:
    for weight in model.parameters():
        weight.zero_()


def test_a_model_that_knows_nothing(zoo: Any) -> None:
    uniform, model = zoo.causal("uniform", change=nothing), zoo.causal("m")
    data = written(zoo, text_of(200))
    alone = evaluate(uniform, ANY, data=data)
    assert alone.candidate.value == pytest.approx(65, rel=1e-6)
    with pytest.raises(
        InputError, match=r"baseline .*uniform scores 65\.00 on perplexity, no better than knowing noth"
    ):
        evaluate(model, ANY, data=data, baseline=uniform)
    result = evaluate(model, ANY, data=data, baseline=uniform, allow_weak_baseline=True)
    assert result.baseline is not None and result.baseline.value == alone.candidate.value


@pytest.fixture(scope="module")
def trained(shelf: Any) -> tuple[Path, Path]:
    """A text that counts, and a model that has learnt to count: below its vocabulary's perplexity."""
    text = " ".join(f"w{index % 60}" for index in range(400))
    path = shelf.folder / "counting.txt"
    path.write_text(text)

    def learn(model: Any) -> None:
        ids = torch.tensor([[5 + (first + place) % 60 for place in range(20)] for first in range(60)])
        with torch.enable_grad():
            model.train()
            steps = torch.optim.Adam(model.parameters(), lr=3e-3)
            for _ in range(25):
                steps.zero_grad()
                model(input_ids=ids, labels=ids).loss.backward()
                steps.step()
            model.eval()

    model: Path = shelf.causal("counts", "LlamaForCausalLM", change=learn)
    return model, path


def noisy(zoo: Any, model: Path, scale: float) -> Path:
    """A copy of a model with noise on its weights."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        zoo.noise(scale)(loaded)
    folder: Path = zoo.folder / f"noisy-{scale}"
    loaded.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def test_drop_agreement_and_gates_are_percent(zoo: Any, trained: tuple[Path, Path]) -> None:
    model, data = trained
    candidate = noisy(zoo, model, 0.02)
    result = evaluate(candidate, ANY, data=data, baseline=model, max_length=20, stride=10)
    theirs, ours = (summed(folder, data.read_text(), 20, 10)[0] for folder in (model, candidate))
    assert theirs < 60 and ours > theirs
    assert result.drop == pytest.approx(100 * (ours - theirs) / theirs, abs=1e-2)
    assert result.points == pytest.approx(100 * theirs / ours, abs=1e-2)
    assert result.interval is not None and result.interval[0] <= result.drop <= result.interval[1]

    ids = transformers.AutoTokenizer.from_pretrained(model)(data.read_text(), return_tensors="pt")["input_ids"]
    choices, odds = [], []
    for folder in (model, candidate):
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        best: list[int] = []
        rows = []
        for begin in range(0, 400 - 20 + 1, 10):
            with torch.no_grad():
                logits = plain(input_ids=ids[:, begin : begin + 20]).logits[0, 9 if begin else 0 : 19]
            best += logits.argmax(-1).tolist()
            rows.append(softmax(logits.double().numpy(), axis=1))
        choices.append(best)
        odds.append(np.concatenate(rows))
    same = sum(a == b for a, b in zip(*choices, strict=True))
    assert len(choices[0]) == result.n
    assert result.agreement == pytest.approx(100 * same / result.n) and 0 < result.agreement < 100

    kl = rel_entr(*odds).sum(1).mean()
    assert kl > 1e-3 and result.kl == pytest.approx(kl, rel=1e-4)
    for size in (1, 7):
        again = evaluate(candidate, ANY, data=data, baseline=model, max_length=20, stride=10, batch_size=size)
        assert again.kl == pytest.approx(kl, rel=1e-4)
    assert Gate(max_kl=2 * kl).failures(result) == [] != Gate(max_kl=kl / 2).failures(result)

    drop, points, agreement = result.drop, result.points, result.agreement
    assert drop is not None and points is not None
    assert Gate(drop, points, agreement).failures(result) == []
    assert [line.split(":")[0] for line in Gate(drop - 0.01, points + 0.01, agreement + 0.01).failures(result)] == [
        "max-drop",
        "min-score",
        "min-agreement",
    ]
    (line,) = Gate(max_drop=0).failures(result)
    assert line.endswith("limit 0 % of the baseline's")
    backwards = evaluate(model, ANY, data=data, baseline=candidate, max_length=20, allow_weak_baseline=True)
    assert backwards.drop is not None and backwards.drop < 0 and Gate(max_drop=0).failures(backwards) == []
    alone = evaluate(model, ANY, data=data)
    assert alone.points is None and len(Gate(1, 1, 1).failures(alone)) == 3


def test_nan_fails_every_gate(zoo: Any, trained: tuple[Path, Path]) -> None:
    model, data = trained

    def spoil(broken: Any) -> None:
        broken.model.embed_tokens.weight[5 + 59] = math.nan

    broken = zoo.causal("broken", "LlamaForCausalLM", change=spoil)
    result = evaluate(broken, ANY, data=data, baseline=model, max_length=20)
    values = (result.candidate.value, result.drop, result.points, result.agreement, result.kl, *(result.interval or ()))
    assert all(value is not None and math.isnan(value) for value in values)
    assert len(Gate(100, 0, 0, 1e9).failures(result)) == 4
    assert None in {row["candidate"] for row in result.predictions}
    body = result.to_json()
    assert (body["candidate"]["score"], body["drop"], body["agreement"]) == (None, None, None)
    again = Evaluation.from_json(json.loads(json.dumps(body, allow_nan=False)))
    assert again.drop is not None and math.isnan(again.drop) and len(Gate(100, 0, 0, 1e9).failures(again)) == 4
    with pytest.raises(InputError, match="gives NaN"):
        evaluate(model, ANY, data=data, baseline=broken, max_length=20)


def test_other_tokens_cannot_be_compared(zoo: Any) -> None:
    one, other = zoo.causal("one"), zoo.causal("other", bos=True)
    with pytest.raises(InputError, match=r"other and .*one cut text into different tokens: their scores on perplexity"):
        evaluate(other, ANY, data=written(zoo, text_of(90)), baseline=one)


def test_heads_and_options_that_do_not_fit(zoo: Any, tiny: Any) -> None:
    data = written(zoo, "w1 w2 w3")
    model = zoo.causal("m")
    for entry in (ANY, MASKED):
        with pytest.raises(InputError, match=r"BertForSequenceClassification, made for classifying texts"):
            evaluate(tiny.model, entry, data=data)
        with pytest.raises(UsageError, match="--doc-stride has no meaning"):
            options_for([entry], {"doc_stride": 1})
        with pytest.raises(UsageError, match=f"--label-column has no meaning for task '{entry.name}'"):
            options_for([entry], {"label_column": "label"})
        with pytest.raises(UsageError, match=f"task '{entry.name}' reads 1 --text-column, not 2"):
            options_for([entry], {"text_columns": ["a", "b"]})
    with pytest.raises(InputError, match="made for generating text; task 'masked-lm' takes a …ForMaskedLM"):
        evaluate(model, MASKED, data=data)
    with pytest.raises(UsageError, match="--stride must be at least 1, not 0"):
        evaluate(model, ANY, data=data, stride=0)
    with pytest.raises(UsageError, match="--stride has no meaning for task 'masked-lm'"):
        options_for([MASKED, task("sst2")], {"stride": 3})
    # Of several tasks those get it that know it.
    shares = options_for([ANY, MASKED, WIKITEXT], {"stride": 3, "limit": 7})
    assert [(own["stride"], own["limit"]) for own in shares if "stride" in own] == [(3, 7), (None, 7), (3, 7)]


def test_files_and_json(zoo: Any, tmp_path: Path, trained: tuple[Path, Path]) -> None:
    model, data = trained
    masked = zoo.make("masked", "BertForMaskedLM")
    texts = zoo.table("texts.jsonl", [{"text": text} for text in zoo.sentences(12)])
    for result in (
        evaluate(model, ANY, data=data, baseline=model, stride=8, max_length=16),
        evaluate(masked, MASKED, data=texts, baseline=masked, allow_weak_baseline=True),
    ):
        again = Evaluation.from_json(json.loads(json.dumps(result.to_json(), allow_nan=False)))
        assert again.to_json() == result.to_json()
        assert (again.interval, again.relative, again.points) == (result.interval, result.relative, result.points)
        for name in ("p.jsonl", "p.csv"):
            write_predictions(result, tmp_path / name)
        lines = (tmp_path / "p.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == result.predictions
        with (tmp_path / "p.csv").open(newline="") as stream:
            cells = [{key: json.loads(cell) for key, cell in row.items()} for row in csv.DictReader(stream)]
        assert cells == result.predictions


@pytest.mark.slow
def test_the_real_model_scores_what_its_maker_measured(test_models: Find, shared_data: Find) -> None:
    """The whole file in windows of 256 without overlap: 93.956 in float32."""
    result = evaluate(test_models("tiny-gpt2-wikitext"), WIKITEXT, data=shared_data("wikitext-2"), max_length=256)
    assert (result.n, f"{result.candidate.value:.3f}") == (363391 // 256 * 255, "93.956")


def masked_alone(folder: Path, rows: list[Any], about: list[Any]) -> list[list[int]]:
    """The best tokens at the masked places, one text at a time."""
    return [[int(logits.argmax()) for logits in row] for row in masked_logits(folder, rows, about)]


def masked_logits(folder: Path, rows: list[Any], about: list[Any]) -> list[list[torch.Tensor]]:
    """The logits at the masked places, one text at a time."""
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    found = []
    for row, places in zip(rows, about, strict=True):
        with torch.no_grad():
            logits = model(**{name: torch.tensor([ids]) for name, ids in row.items()}).logits[0]
        found.append([logits[place] for place in places])
    return found


def asked(folder: Path, data: Path, length: int = 40) -> tuple[list[Any], list[Any]]:
    """The rows that the exam makes for a model."""
    own = transformers.AutoTokenizer.from_pretrained(folder)
    exam = MaskedLanguage(MASKED, Request(data))
    return exam.encode(own, transformers.AutoConfig.from_pretrained(folder), length, "m")


@pytest.fixture
def texts(zoo: Any) -> Path:
    table: Path = zoo.table("texts.jsonl", [{"text": text} for text in [*zoo.sentences(60), " ", "w1 " * 90, "zzz"]])
    return table


@pytest.mark.parametrize(("architecture", "left"), [("BertForMaskedLM", False), ("RobertaForMaskedLM", True)])
def test_masked_tokens_are_guessed_as_in_a_loop(zoo: Any, texts: Path, architecture: str, left: bool) -> None:
    model, other = zoo.make("m", architecture), zoo.make("noisy", architecture, change=zoo.noise(0.02))
    if left:
        for folder in (model, other):
            config = json.loads((folder / "tokenizer_config.json").read_text())
            (folder / "tokenizer_config.json").write_text(json.dumps({**config, "padding_side": "left"}))
            assert transformers.AutoTokenizer.from_pretrained(folder).padding_side == "left"
    # RoBERTa's positions count from behind the padding token: 39 of 40 are free.
    rows, about = asked(model, texts, 39 if left else 40)
    theirs, ours = masked_alone(model, rows, about), masked_alone(other, rows, about)
    odds = [
        [softmax(logits.double().numpy()) for row in masked_logits(folder, rows, about) for logits in row]
        for folder in (model, other)
    ]
    kl = np.mean([rel_entr(p, q).sum() for p, q in zip(*odds, strict=True)])
    for size in (1, 7, 64):
        result = evaluate(other, MASKED, data=texts, baseline=model, batch_size=size, allow_weak_baseline=True)
        assert [row["baseline"] for row in result.predictions] == theirs
        assert [row["candidate"] for row in result.predictions] == ours
        truth = [token for row in result.predictions for token in row["label"]]
        first, second = ([token for tokens in side for token in tokens] for side in (theirs, ours))
        hits = sum(a == b for a, b in zip(truth, second, strict=True))
        assert result.candidate.value == pytest.approx(100 * hits / len(truth), abs=1e-9)
        same = sum(a == b for a, b in zip(first, second, strict=True))
        assert result.agreement == pytest.approx(100 * same / len(truth)) and 0 < same < len(truth)
        assert (result.n, result.unit) == (61, "texts")
        assert kl > 1e-3 and result.kl == pytest.approx(kl, rel=1e-4)


def test_which_tokens_are_masked(zoo: Any, texts: Path) -> None:
    model = zoo.make("m", "BertForMaskedLM")
    own = transformers.AutoTokenizer.from_pretrained(model)
    rows, about = asked(model, texts)
    plain = [text for text in (json.loads(line)["text"] for line in texts.read_text().splitlines()) if text.strip()]
    assert len(rows) == len(plain) - 1  # nothing of "zzz" is known
    chosen = set()
    for row, places, text in zip(rows, about, plain, strict=False):
        ids = own(text, truncation=True, max_length=40)["input_ids"]
        free = [place for place, token in enumerate(ids) if token >= 5]
        assert places == sorted(set(places)) and set(places) <= set(free)
        assert len(places) == math.ceil(0.15 * len(free))
        assert row["input_ids"] == [4 if place in places else token for place, token in enumerate(ids)]
        chosen |= set(places)
    assert len(chosen) > 8
    assert asked(model, texts) == (rows, about)
    shorter = zoo.table("shorter.jsonl", [{"text": text} for text in plain[:5]])
    assert asked(model, shorter) == (rows[:5], about[:5])


def test_masks_that_cannot_be(zoo: Any, texts: Path) -> None:
    model = zoo.make("m", "BertForMaskedLM")
    maskless = zoo.causal("maskless", "BertForMaskedLM")
    with pytest.raises(InputError, match=r"the tokenizer of .*maskless has no mask token"):
        evaluate(maskless, MASKED, data=texts)
    unknown = zoo.table("unknown.jsonl", [{"text": "zzz yyy"}])
    with pytest.raises(InputError, match=r"unknown\.jsonl holds no text whose tokens could be masked"):
        evaluate(model, MASKED, data=unknown)
    other = zoo.make("other", "BertForMaskedLM", words=[f"w{59 - index}" for index in range(60)])
    with pytest.raises(InputError, match="cut text into different tokens"):
        evaluate(other, MASKED, data=texts, baseline=model)


def test_masked_nan_and_the_most_frequent_token(zoo: Any) -> None:
    def spoil(broken: Any) -> None:
        broken.bert.embeddings.word_embeddings.weight[5 + 7] = math.nan

    model, broken = zoo.make("m", "BertForMaskedLM"), zoo.make("broken", "BertForMaskedLM", change=spoil)
    data = zoo.table("data.jsonl", [{"text": "w1"}, {"text": "w1"}, {"text": "w1"}, {"text": "w2 w7 w7 w7 w7 w7"}])
    with pytest.raises(InputError, match=r"on masked-lm, no better than .* \((75|100)\.00\)"):
        evaluate(model, MASKED, data=data, baseline=model, limit=4)
    result = evaluate(broken, MASKED, data=data, baseline=model, allow_weak_baseline=True)
    assert math.isnan(result.candidate.value) and result.agreement is not None and math.isnan(result.agreement)
    assert result.kl is not None and math.isnan(result.kl)
    assert len(Gate(100, 0, 0, 1e9).failures(result)) == 4


def test_a_model_that_sees_what_it_should_guess_is_refused(zoo: Any) -> None:
    data = written(zoo, "w1 w2 w3 w4 w5")
    both = zoo.make("both", "BertLMHeadModel")
    with pytest.raises(InputError, match="reads text in both directions"):
        evaluate(both, ANY, data=data)
    assert evaluate(zoo.make("one", "BertLMHeadModel", is_decoder=True), ANY, data=data).n == 6
