"""Question answering against a search over all spans, window by window, with plain transformers."""

import csv
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scipy.special import rel_entr, softmax

from qtool.errors import InputError, UsageError
from qtool.evaluation.gate import Gate
from qtool.evaluation.result import Evaluation, write_predictions
from qtool.evaluation.runner import evaluate
from qtool.evaluation.tasks import task

SQUAD = task("squad")
Answer = tuple[float, str]
Find = Callable[[str], Path]


def windows(tokens: int, room: int, stride: int) -> list[range]:
    """Which tokens of a context each window reads, `room` at a time, `stride` of them shared with the one before."""
    found = [range(min(room, tokens))]
    while stride and found[-1].stop < tokens:
        begin = found[-1].start + room - stride
        found.append(range(begin, min(begin + room, tokens)))
    return found


def searched(folder: Path, question: str, context: str, length: int, stride: int) -> list[Answer]:
    """Every text of at most 30 tokens with its best start + end logit, the best first; tokens are words and marks."""
    places = [match.span() for match in re.finditer(r"\w+|[^\w\s]+", context)]
    best: dict[str, float] = {}
    for window, start, end in asked_logits(folder, question, context, length, stride):
        for first in range(len(window)):
            for last in range(first, min(first + 30, len(window))):
                text = context[places[window[first]][0] : places[window[last]][1]]
                best[text] = max(best.get(text, -math.inf), start[first] + end[last])
    return sorted(((score, text) for text, score in best.items()), reverse=True)


def asked_logits(
    folder: Path, question: str, context: str, length: int, stride: int
) -> list[tuple[range, list[float], list[float]]]:
    """Of each window its tokens of the context, and their start and end logits."""
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    own = transformers.AutoTokenizer.from_pretrained(folder)
    places = [match.span() for match in re.finditer(r"\w+|[^\w\s]+", context)]
    asked = own.convert_tokens_to_ids(re.findall(r"\w+|[^\w\s]+", question))
    ids = own.convert_tokens_to_ids([context[begin:end] for begin, end in places])
    found = []
    for window in windows(len(ids), length - len(asked) - 3, stride):
        row = [2, *asked, 3, *(ids[place] for place in window), 3]
        types = [0] * (len(asked) + 2) + [1] * (len(window) + 1)
        typed = {"token_type_ids": torch.tensor([types])} if "Bert" in type(model).__name__ else {}
        with torch.no_grad():
            out = model(input_ids=torch.tensor([row]), **typed)
        start, end = (side[0].double().tolist()[len(asked) + 2 : -1] for side in (out.start_logits, out.end_logits))
        found.append((window, start, end))
    return found


def divergence(folders: Sequence[Path], pairs: Sequence[tuple[str, str]], length: int, stride: int) -> float:
    """Mean over questions of the mean over windows of Σ p log(p / q), p and q over all pairs of start and end."""
    questions = []
    for pair in pairs:
        odds = []
        for folder in folders:
            both = [(np.asarray(s), np.asarray(e)) for _, s, e in asked_logits(folder, *pair, length, stride)]
            odds.append([softmax(start[:, None] + end[None, :]) for start, end in both])
        questions.append(np.mean([rel_entr(p, q).sum() for p, q in zip(*odds, strict=True)]))
    return float(np.mean(questions))


def overlap(answer: str, golds: Sequence[str]) -> float:
    """F1 of words, the best over the golds; for texts without articles."""
    bags = [(Counter(answer.lower().split()), Counter(gold.lower().split())) for gold in golds]
    return max(2 * (a & b).total() / (a.total() + b.total()) for a, b in bags)


@pytest.fixture(scope="module")
def examples() -> list[tuple[str, str]]:
    """Questions of 2 to 5 words, contexts of 3 to 90."""
    draw = random.Random(7)
    word = [f"w{index}" for index in range(60)]
    sizes = [3, 10, 28, 31, 32, 33, 60, 90]
    return [
        (" ".join(draw.choices(word, k=draw.randint(2, 5))), " ".join(draw.choices(word, k=size)))
        for size in sizes
        for _ in range(2)
    ]


def rows_of(pairs: Sequence[tuple[str, str]], golds: Sequence[Any]) -> list[dict[str, Any]]:
    triples = zip(pairs, golds, strict=True)
    return [{"question": question, "context": context, "answers": gold} for (question, context), gold in triples]


def squad(text: str) -> dict[str, Any]:
    return {"text": [text, "w99"], "answer_start": [0, 0]}


@pytest.mark.parametrize(("stride", "length"), [(0, None), (8, None), (20, 40), (3, 20)])
def test_spans_and_scores_are_those_of_a_search(
    zoo: Any, examples: list[tuple[str, str]], stride: int, length: int | None
) -> None:
    model = zoo.make("qa", "BertForQuestionAnswering")
    noisy = zoo.make("noisy", "BertForQuestionAnswering", change=zoo.noise(0.01))
    found = {
        folder: [searched(folder, *pair, length or 40, stride)[0][1] for pair in examples] for folder in (model, noisy)
    }
    golds = [text if index % 3 else "w1 w2" for index, text in enumerate(found[model])]
    data = zoo.table("data.jsonl", rows_of(examples, list(map(squad, golds))))
    results = [
        evaluate(noisy, SQUAD, data=data, baseline=model, doc_stride=stride, max_length=length, batch_size=size)
        for size in (1, 3, 32)
    ]
    apart = divergence((model, noisy), examples, length or 40, stride)
    for result in results:
        assert [row["baseline"] for row in result.predictions] == found[model]
        assert [row["candidate"] for row in result.predictions] == found[noisy]
        assert result.baseline is not None and (result.n, result.unit, result.metric) == (16, "questions", "squad_f1")
        for score, texts in ((result.baseline, found[model]), (result.candidate, found[noisy])):
            pairs = list(zip(texts, golds, strict=True))
            assert score.value == pytest.approx(100 * sum(overlap(a, [b, "w99"]) for a, b in pairs) / 16, abs=1e-9)
            assert score.others["exact_match"] == pytest.approx(100 * sum(a == b for a, b in pairs) / 16, abs=1e-9)
        same = sum(a == b for a, b in zip(found[model], found[noisy], strict=True))
        assert result.agreement == pytest.approx(100 * same / 16) and 0 < same < 16
        assert result.settings["doc_stride"] == stride
        assert result.kl == pytest.approx(apart, rel=1e-4) and apart > 1e-3
    assert results[0].interval == results[1].interval == results[2].interval


def test_windows_find_what_one_window_does_not_reach(zoo: Any) -> None:
    assert windows(90, 30, 10) == [range(0, 30), range(20, 50), range(40, 70), range(60, 90)]
    assert windows(90, 30, 0) == [range(30)]
    model = zoo.make("qa", "BertForQuestionAnswering")
    context = " ".join(f"w{index % 40}" for index in range(80)) + " w50"
    last = searched(model, "w1", context, 40, 10)[0][1]
    data = zoo.table("data.jsonl", rows_of([("w1", context)], [squad(last)]))
    cut = evaluate(model, SQUAD, data=data, doc_stride=0).predictions[0]["candidate"]
    assert cut in " ".join(context.split()[:36])
    assert evaluate(model, SQUAD, data=data, doc_stride=10).candidate.others["exact_match"] == 100.0


def test_the_usual_overlap_is_128_and_at_most_half_a_window(zoo: Any, examples: list[tuple[str, str]]) -> None:
    model = zoo.make("qa", "BertForQuestionAnswering")
    data = zoo.table("data.jsonl", rows_of(examples, [squad("w1")] * len(examples)))
    usual = [row["candidate"] for row in evaluate(model, SQUAD, data=data).predictions]
    assert usual == [searched(model, *pair, 40, 20)[0][1] for pair in examples]


@pytest.mark.parametrize("stride", [0, 12])
def test_n_best_spans(zoo: Any, examples: list[tuple[str, str]], stride: int) -> None:
    model = zoo.make("qa", "BertForQuestionAnswering")
    # A context of one word said often has fewer texts than spans.
    pairs = [*examples, ("w1", "w5 " * 9), ("w1", "w2")]
    data = zoo.table("data.jsonl", rows_of(pairs, [squad("w1")] * len(pairs)))
    result = evaluate(model, SQUAD, data=data, doc_stride=stride, n_best=9)
    for row, pair in zip(result.predictions, pairs, strict=True):
        wanted = searched(model, *pair, 40, stride)[:9]
        assert [item["text"] for item in row["n_best"]] == [text for _, text in wanted]
        assert [item["score"] for item in row["n_best"]] == pytest.approx([score for score, _ in wanted], abs=1e-4)
        assert row["candidate"] == row["n_best"][0]["text"]
    assert len(result.predictions[-1]["n_best"]) == 1
    assert "n_best" not in evaluate(model, SQUAD, data=data, doc_stride=stride).predictions[0]


def test_tokenizers_that_pad_on_the_left(zoo: Any, examples: list[tuple[str, str]]) -> None:
    model = zoo.causal("qa", "LlamaForQuestionAnswering", left=True)
    data = zoo.table("data.jsonl", rows_of(examples, [squad("w1")] * len(examples)))
    alone = evaluate(model, SQUAD, data=data, doc_stride=9, batch_size=1)
    padded = evaluate(model, SQUAD, data=data, doc_stride=9, batch_size=7)
    assert [row["candidate"] for row in alone.predictions] == [row["candidate"] for row in padded.predictions]
    assert len({row["candidate"] for row in alone.predictions}) > 8
    for row, (_, context) in zip(padded.predictions, examples, strict=True):
        assert f" {row['candidate']} " in f" {context} "
    noisy = zoo.causal("noisy", "LlamaForQuestionAnswering", left=True, change=zoo.noise(0.02))
    one, many = (
        evaluate(noisy, SQUAD, data=data, baseline=model, doc_stride=9, batch_size=size, allow_weak_baseline=True).kl
        for size in (1, 7)
    )
    assert many == pytest.approx(one, rel=1e-4) and many is not None and many > 1e-4


def test_texts_are_cut_from_the_context_as_it_is_written(zoo: Any) -> None:
    model = zoo.make("qa", "BertForQuestionAnswering")
    pairs = [
        ("  w3 w4?", "   w1,  w2 été – w3\tw4 (ω5) 東京 w6"),
        ("w1", "\n\n w1 w2 😀 w3 w4"),
        ("w7 w8", "ﬁ w9 İstanbul ß w1"),
    ]
    data = zoo.table("data.jsonl", rows_of(pairs, [squad("w1")] * 3))
    result = evaluate(model, SQUAD, data=data, n_best=4)
    for row, (question, context) in zip(result.predictions, pairs, strict=True):
        wanted = searched(model, question.lstrip(), context, 40, 0)[:4]
        assert [item["text"] for item in row["n_best"]] == [text for _, text in wanted]


def test_byte_level_tokens_give_whole_characters(zoo: Any) -> None:
    contexts = ["Zoë ate çaça in Łódź.", "  Été at São Paulo", "Łódź"]
    model = zoo.byte_level("qa", "RobertaForQuestionAnswering", " ".join([*contexts, "Who ate it?"]))
    data = zoo.table("data.jsonl", rows_of([("Who ate it?", context) for context in contexts], [squad("x")] * 3))
    loaded = transformers.AutoModelForQuestionAnswering.from_pretrained(model).eval()
    own = transformers.AutoTokenizer.from_pretrained(model)
    for row, context in zip(evaluate(model, SQUAD, data=data).predictions, contexts, strict=True):
        coded = own("Who ate it?", context, return_offsets_mapping=True, return_tensors="pt")
        offsets = coded.pop("offset_mapping")[0].tolist()
        mine = [place for place, part in enumerate(coded.sequence_ids()) if part == 1]
        assert len(mine) > len(context.split())
        with torch.no_grad():
            out = loaded(**coded)
        sums = {
            (first, last): float(out.start_logits[0, first].double() + out.end_logits[0, last].double())
            for first in mine
            for last in mine
            if first <= last < first + 30
        }
        first, last = max(sums, key=sums.__getitem__)
        assert row["candidate"] == context[offsets[first][0] : offsets[last][1]]


@pytest.mark.parametrize("stride", [0, 4, None])
def test_a_question_that_leaves_no_room(zoo: Any, capfd: pytest.CaptureFixture[str], stride: int | None) -> None:
    model = zoo.make("qa", "BertForQuestionAnswering")
    pairs = [("w1", "w2 " * 50), ("w1 " * 37, "w2 w3")]
    data = zoo.table("data.jsonl", rows_of(pairs, [squad("w1")] * 2))
    with pytest.raises(InputError, match=r"row 2: a question of 37 tokens leaves no room .* within 40 tokens"):
        evaluate(model, SQUAD, data=data, doc_stride=stride)
    assert "panicked" not in capfd.readouterr().err


def test_an_overlap_as_wide_as_the_window(zoo: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """36 of 40 tokens are left for the context: an overlap of 35 moves on by one, of 36 not at all."""
    model = zoo.make("qa", "BertForQuestionAnswering")
    data = zoo.table("long.jsonl", rows_of([("w1", "w2 " * 37)], [squad("w1")]))
    assert evaluate(model, SQUAD, data=data, doc_stride=35).n == 1
    for stride in (36, 40, 4000):
        with pytest.raises(InputError, match=f"row 1: a question of 1 tokens .*overlap {stride}"):
            evaluate(model, SQUAD, data=data, doc_stride=stride)
    short = zoo.table("short.jsonl", rows_of([("w1 w1 w1", "w2 w3")], [squad("w1")]))
    assert evaluate(model, SQUAD, data=short, doc_stride=4000).n == 1
    with pytest.raises(InputError, match="within 3 tokens"):
        evaluate(model, SQUAD, data=short, max_length=3)
    assert "panicked" not in capfd.readouterr().err


def test_a_cut_question_has_the_one_window_of_its_context_that_fits(zoo: Any) -> None:
    model = zoo.make("qa", "BertForQuestionAnswering")
    question, context = " ".join(["w1"] * 30), " ".join(f"w{index}" for index in range(2, 50))
    data = zoo.table("data.jsonl", rows_of([(question, context)], [squad("w1")]))
    (row,) = evaluate(model, SQUAD, data=data, doc_stride=0).predictions
    assert row["candidate"] == searched(model, question, context, 40, 0)[0][1]
    assert set(row["candidate"].split()) <= {f"w{index}" for index in range(2, 9)}


@pytest.mark.parametrize("form", [squad, lambda text: [text, "w99"], lambda text: text])
def test_forms_of_the_answers(zoo: Any, form: Callable[[str], Any]) -> None:
    model = zoo.make("qa", "BertForQuestionAnswering")
    pairs = [("w1", "w2 w3 w4"), ("w2", "w5 w6")]
    best = [searched(model, *pair, 40, 0)[0][1] for pair in pairs]
    data = zoo.table("data.jsonl", rows_of(pairs, [form(text) for text in best]))
    result = evaluate(model, SQUAD, data=data)
    assert (result.candidate.value, result.candidate.others) == (100.0, {"exact_match": 100.0})
    assert [row["label"][0] for row in result.predictions] == best


@pytest.mark.parametrize("answers", [{"text": [], "answer_start": []}, None, [], 3, [1], {"start": 1}])
def test_rows_without_answers(zoo: Any, answers: Any) -> None:
    model = zoo.make("qa", "BertForQuestionAnswering")
    data = zoo.table("data.jsonl", rows_of([("w1", "w2"), ("w1", "w2")], ["w2", answers]))
    with pytest.raises(InputError, match=r"data\.jsonl: row 2 has no answers in column answers"):
        evaluate(model, SQUAD, data=data)


def test_columns_by_other_names(zoo: Any) -> None:
    model = zoo.make("qa", "BertForQuestionAnswering")
    data = zoo.table("data.jsonl", [{"q": "w1", "p": "w2 w3", "gold": "w2"}])
    asked = evaluate(model, SQUAD, data=data, text_columns=["q", "p"], label_column="gold")
    assert asked.predictions[0]["candidate"] == searched(model, "w1", "w2 w3", 40, 0)[0][1]
    with pytest.raises(InputError, match="a question needs two columns"):
        evaluate(model, SQUAD, data=data, text_columns=["q"], label_column="gold")
    with pytest.raises(InputError, match="no answers in column answers"):
        evaluate(model, SQUAD, data=data, text_columns=["q", "p"])


def test_an_empty_context_is_a_wrong_answer_and_no_missing_one(zoo: Any) -> None:
    model = zoo.make("qa", "BertForQuestionAnswering")
    data = zoo.table("data.jsonl", rows_of([("w1", " "), ("w1", "w2")], ["w3", "w2"]))
    result = evaluate(model, SQUAD, data=data)
    assert [row["candidate"] for row in result.predictions] == ["", "w2"]
    assert result.candidate.value == 50.0


def test_nan_is_no_answer_and_no_score(zoo: Any) -> None:
    def spoil(model: Any) -> None:
        model.bert.embeddings.word_embeddings.weight[5 + 59] = math.nan  # the word w59

    model = zoo.make("qa", "BertForQuestionAnswering")
    broken = zoo.make("broken", "BertForQuestionAnswering", change=spoil)
    # The second context has w59 in its second window only.
    pairs = [("w1", "w2 w3"), ("w1", "w2 " * 40 + "w59"), ("w1", "w59")]
    data = zoo.table("data.jsonl", rows_of(pairs, ["w2", "w2", "w59"]))
    result = evaluate(broken, SQUAD, data=data, baseline=model, doc_stride=5, n_best=2)
    assert [row["candidate"] is None for row in result.predictions] == [False, True, True]
    assert result.predictions[1]["n_best"] == []
    values = (result.candidate.value, result.drop, result.agreement, result.kl, *(result.interval or ()))
    assert all(value is not None and math.isnan(value) for value in values)
    assert len(Gate(100, 0, 0, 1e9).failures(result)) == 4
    assert result.to_json()["candidate"]["score"] is None
    with pytest.raises(InputError, match=r"the baseline .*broken gives NaN"):
        evaluate(model, SQUAD, data=data, baseline=broken)


def test_heads_and_options_that_do_not_fit(zoo: Any, tiny: Any) -> None:
    data = zoo.table("data.jsonl", rows_of([("w1", "w2")], ["w2"]))
    with pytest.raises(InputError, match=r"BertForSequenceClassification, made for classifying texts; task 'squad'"):
        evaluate(tiny.model, SQUAD, data=data)
    model = zoo.make("qa", "BertForQuestionAnswering")
    with pytest.raises(InputError, match="made for finding answers"):
        evaluate(model, task("sst2"), data=data)
    with pytest.raises(UsageError, match="--stride has no meaning for task 'squad'"):
        evaluate(model, SQUAD, data=data, stride=4)
    with pytest.raises(UsageError, match="--doc-stride must be at least 0, not -1"):
        evaluate(model, SQUAD, data=data, doc_stride=-1)
    with pytest.raises(UsageError, match="--n-best must be at least 1, not 0"):
        evaluate(model, SQUAD, data=data, n_best=0)


def test_models_with_tokenizers_of_their_own(zoo: Any) -> None:
    """Bytes give more windows than words: each side has its own, and the texts are what is compared."""
    words = zoo.make("words", "BertForQuestionAnswering")
    pairs = [("w1 w2", "w3 w4 w5 w6 " * count) for count in (1, 3, 9)]
    data = zoo.table("data.jsonl", rows_of(pairs, ["w3"] * 3))
    pieces = zoo.byte_level("bytes", "RobertaForQuestionAnswering", "w1 w2 w33 w4 w5 w6")
    alone = [evaluate(model, SQUAD, data=data, doc_stride=4, max_length=30).predictions for model in (words, pieces)]
    both = evaluate(pieces, SQUAD, data=data, doc_stride=4, max_length=30, baseline=words, allow_weak_baseline=True)
    for row, first, second in zip(both.predictions, *alone, strict=True):
        assert (row["baseline"], row["candidate"]) == (first["candidate"], second["candidate"])
        assert row["baseline"] in pairs[row["index"]][1] and row["candidate"] in pairs[row["index"]][1]
    assert both.kl is None


def test_files_and_json(zoo: Any, examples: list[tuple[str, str]], tmp_path: Path) -> None:
    model = zoo.make("qa", "BertForQuestionAnswering")
    data = zoo.table("data.jsonl", rows_of(examples, [squad(f'"{pair[1][:8]}", é') for pair in examples]))
    result = evaluate(model, SQUAD, data=data, baseline=model, n_best=3)
    again = Evaluation.from_json(json.loads(json.dumps(result.to_json(), allow_nan=False)))
    assert again.to_json() == result.to_json()
    assert (again.candidate, again.interval, again.unit) == (result.candidate, result.interval, "questions")
    for name in ("p.jsonl", "p.csv"):
        write_predictions(result, tmp_path / name)
    lines = (tmp_path / "p.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == result.predictions
    with (tmp_path / "p.csv").open(newline="", encoding="utf-8") as stream:
        for row, wanted in zip(csv.DictReader(stream), result.predictions, strict=True):
            assert (row["candidate"], row["baseline"]) == (wanted["candidate"], wanted["baseline"])
            assert (json.loads(row["label"]), json.loads(row["n_best"])) == (wanted["label"], wanted["n_best"])


@pytest.mark.exhaustive  # that score is also the float one of `test_real_models.test_answers`
def test_the_real_model_scores_what_its_maker_measured(test_models: Find, shared_data: Find) -> None:
    result = evaluate(test_models("minilm-qa"), SQUAD, data=shared_data("xquad-en"), doc_stride=0)
    assert (result.n, f"{result.candidate.value:.2f}") == (612, "57.76")
    assert json.dumps(result.to_json(), allow_nan=False)
    usual = evaluate(test_models("minilm-qa"), SQUAD, data=shared_data("xquad-en"))
    assert sum(a != b for a, b in zip(result.predictions, usual.predictions, strict=True)) <= 5  # that many are cut
