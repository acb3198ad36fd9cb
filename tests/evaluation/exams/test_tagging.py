"""Token classification against plain transformers, one sentence at a time, and seqeval."""

import csv
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seqeval.metrics
import torch
import transformers
from scipy.special import rel_entr, softmax
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from qtool.errors import InputError, UsageError
from qtool.evaluation.gate import Gate
from qtool.evaluation.result import Evaluation, write_predictions
from qtool.evaluation.runner import evaluate
from qtool.evaluation.tasks import task

TAGGING = task("token-classification")
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
WEAK: Any = {"allow_weak_baseline": True}
HEAD = "BertForTokenClassification"


@pytest.fixture(scope="module")
def sentences() -> list[list[str]]:
    """1 to 14 words; some are several tokens, and one is none at all."""
    draw = random.Random(3)
    words = [*(f"w{index}" for index in range(60)), *(f"w{index}.w{index + 1}!" for index in range(20)), "unheard-of"]
    return [*(draw.choices(words, k=draw.randint(1, 14)) for _ in range(40)), ["w1", "\u00a0", "w2"]]


def tagged(folder: Path, sentences: Sequence[Sequence[str]], tokens: int = 38) -> list[list[str]]:
    """What the model says of the first token of each word; O for words that have none within `tokens`."""
    names = transformers.AutoConfig.from_pretrained(folder).id2label
    return [
        ["O" if logits is None else names[int(logits.argmax())] for logits in row]
        for row in asked(folder, sentences, tokens)
    ]


def asked(folder: Path, sentences: Sequence[Sequence[str]], tokens: int = 38) -> list[list[Any]]:
    """The logits of the first token of each word; None for words that have none within `tokens`."""
    model = transformers.AutoModelForTokenClassification.from_pretrained(folder).eval()
    own = transformers.AutoTokenizer.from_pretrained(folder)
    found = []
    for words in sentences:
        pieces = [own.convert_tokens_to_ids(own.tokenize(word)) for word in words]
        ids = [token for piece in pieces for token in piece][:tokens]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[2, *ids, 3]])).logits[0, 1:]
        first, own_logits = 0, []
        for piece in pieces:
            own_logits.append(logits[first] if piece and first < len(ids) else None)
            first += len(piece)
        found.append(own_logits)
    return found


def divergence(model: Path, other: Path, sentences: Sequence[Sequence[str]], tokens: int = 38) -> float:
    """Mean over the words that are read of Σ p (log p − log q), in float64."""
    found = []
    for pair in zip(asked(model, sentences, tokens), asked(other, sentences, tokens), strict=True):
        for theirs, ours in zip(*pair, strict=True):
            if theirs is not None:
                p, q = (logits.double().numpy() for logits in (theirs, ours))
                found.append(rel_entr(softmax(p), softmax(q)).sum())
    return float(np.mean(found))


def changed(tags: Sequence[Sequence[str]]) -> list[list[str]]:
    """The same tags, but every fifth is another one."""
    draw = random.Random(1)
    return [[draw.choice(TAGS) if draw.random() < 0.2 else tag for tag in row] for row in tags]


def rows_of(sentences: Sequence[Any], tags: Sequence[Any], column: str = "tags") -> list[dict[str, Any]]:
    return [{"tokens": words, column: own} for words, own in zip(sentences, tags, strict=True)]


def scores(truth: Any, found: Any) -> list[float]:
    names = ("f1_score", "precision_score", "recall_score")
    return [100 * float(getattr(seqeval.metrics, name)(truth, found)) for name in names]


def three(result: Evaluation) -> list[float]:
    others = result.candidate.others
    return [result.candidate.value, others["entity_precision"], others["entity_recall"]]


@pytest.mark.parametrize("batch_size", [1, 6, 64])
def test_numbers_are_those_of_seqeval(zoo: Any, sentences: list[list[str]], batch_size: int) -> None:
    model, noisy = zoo.make("m", HEAD, labels=TAGS), zoo.make("noisy", HEAD, labels=TAGS, change=zoo.noise(0.02))
    theirs, ours = tagged(model, sentences), tagged(noisy, sentences)
    truth = changed(theirs)
    data = zoo.table("data.jsonl", rows_of(sentences, truth))
    result = evaluate(noisy, TAGGING, data=data, baseline=model, batch_size=batch_size)
    assert (result.n, result.unit, result.metric) == (41, "sentences", "entity_f1")
    assert [row["candidate"] for row in result.predictions] == ours
    assert [row["baseline"] for row in result.predictions] == theirs
    assert [row["label"] for row in result.predictions] == truth
    assert three(result) == pytest.approx(scores(truth, ours), abs=1e-9)
    assert result.baseline is not None
    assert result.baseline.value == pytest.approx(scores(truth, theirs)[0], abs=1e-9)
    pairs = [a == b for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True)]
    assert result.agreement == pytest.approx(100 * sum(pairs) / len(pairs), abs=1e-9) and 50 < result.agreement < 100
    assert result.drop == pytest.approx(result.baseline.value - result.candidate.value, abs=1e-9)
    assert result.kl == pytest.approx(divergence(model, noisy, sentences), rel=1e-4) and result.kl > 1e-3
    cut = evaluate(noisy, TAGGING, data=data, baseline=model, batch_size=batch_size, max_length=7)
    assert cut.kl == pytest.approx(divergence(model, noisy, sentences, 5), rel=1e-4)


@pytest.mark.parametrize("column", ["tags", "ner_tags", "labels", "mine"])
def test_tags_may_be_numbers(zoo: Any, sentences: list[list[str]], column: str) -> None:
    model = zoo.make("m", HEAD, labels=TAGS)
    truth = changed(tagged(model, sentences))
    numbers = [[TAGS.index(tag) for tag in row] for row in truth]
    data = zoo.table("data.jsonl", rows_of(sentences, numbers, column))
    given = {"label_column": "mine"} if column == "mine" else {}
    result = evaluate(model, TAGGING, data=data, **given)
    assert three(result) == pytest.approx(scores(truth, tagged(model, sentences)), abs=1e-9)
    assert [row["label"] for row in result.predictions] == truth


def test_heads_may_order_their_tags_otherwise(zoo: Any, sentences: list[list[str]]) -> None:
    order = [3, 0, 4, 2, 1]

    def move(model: Any) -> None:
        model.classifier.weight.copy_(model.classifier.weight[order].clone())
        model.classifier.bias.copy_(model.classifier.bias[order].clone())

    model = zoo.make("m", HEAD, labels=TAGS)
    moved = zoo.make("moved", HEAD, labels=[TAGS[index] for index in order], change=move)
    truth = changed(tagged(model, sentences))
    numbers = [[TAGS.index(tag) for tag in row] for row in truth]
    for tags in (truth, numbers):  # numbers mean what they mean to the baseline
        data = zoo.table("data.jsonl", rows_of(sentences, tags))
        result = evaluate(moved, TAGGING, data=data, baseline=model)
        assert (result.drop, result.agreement) == (0.0, 100.0)
        assert result.candidate.value == pytest.approx(scores(truth, tagged(moved, sentences))[0], abs=1e-9)
        assert result.kl == pytest.approx(0, abs=1e-9)  # tags are compared by name
    more = zoo.make("more", HEAD, labels=[*TAGS, "B-ORG"])
    assert evaluate(more, TAGGING, data=data, baseline=model).kl is None


def test_tags_that_the_head_does_not_have(zoo: Any) -> None:
    model = zoo.make("m", HEAD, labels=TAGS)
    for tag, why in (
        ("B-ORG", r"has the tag B-ORG, .* knows O, B-PER"),
        (5, "has the tag 5, and there are 5"),
        (-100, "tag -100"),
    ):
        data = zoo.table("data.jsonl", rows_of([["w1", "w2"]], [[TAGS[0] if isinstance(tag, str) else 0, tag]]))
        with pytest.raises(InputError, match=why):
            evaluate(model, TAGGING, data=data)
    nameless = zoo.make("nameless", HEAD, num_labels=5)
    data = zoo.table("data.jsonl", rows_of([["w1"]], [["O"]]))
    with pytest.raises(InputError, match=r"does not name its tags \(LABEL_0, .*id2label"):
        evaluate(nameless, TAGGING, data=data)


def test_sentences_longer_than_the_model(zoo: Any) -> None:
    model = zoo.make("m", HEAD, labels=TAGS)
    sentences = [[f"w{index % 60}" for index in range(60)], ["w1.w2.w3.w4.w5", "w6", "w7"]]
    for length, tokens in ((None, 38), (6, 4)):
        found = tagged(model, sentences, tokens)
        assert set(found[0][tokens:]) == {"O"} and found[1][1:] == ["O", "O"] if length else True
        data = zoo.table("data.jsonl", rows_of(sentences, changed(found)))
        result = evaluate(model, TAGGING, data=data, max_length=length)
        assert [row["candidate"] for row in result.predictions] == found
    for length in (1, 2):
        with pytest.raises(InputError, match=f"maximum length of {length} leaves no room for words"):
            evaluate(model, TAGGING, data=data, max_length=length)


CONLL = """

-DOCSTART- -X- -X- O

w1 NNP B-NP B-PER
w2 NNP I-NP I-PER

-DOCSTART- -X- -X- O
w3 IN B-PP O
w4 NNP B-NP B-LOC
   \t
w5\tNN\tB-NP\tO


"""


def test_conll_columns(zoo: Any, tmp_path: Path) -> None:
    model = zoo.make("m", HEAD, labels=TAGS)
    sentences, truth = [["w1", "w2"], ["w3", "w4"], ["w5"]], [["B-PER", "I-PER"], ["O", "B-LOC"], ["O"]]
    for name in ("validation.conll", "dev.conll"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_text(CONLL)
        result = evaluate(model, TAGGING, data=folder)
        assert [row["label"] for row in result.predictions] == truth
        assert [row["candidate"] for row in result.predictions] == tagged(model, sentences)
    bare = tmp_path / "bare.conll"
    bare.write_text("w1 O\nw2\n")
    with pytest.raises(InputError, match=r"bare\.conll: line 2 has one column"):
        evaluate(model, TAGGING, data=bare)
    bare.write_text("\n-DOCSTART- -X- O\n\n")
    with pytest.raises(InputError, match="it holds no rows"):
        evaluate(model, TAGGING, data=bare)
    unended = tmp_path / "unended.conll"
    unended.write_bytes(b"\xef\xbb\xbfw1 B-PER\r\nw2 O")
    assert evaluate(model, TAGGING, data=unended).predictions[0]["label"] == ["B-PER", "O"]


@pytest.mark.parametrize("stored", [False, True])
def test_byte_level_words_are_read_as_in_running_text(zoo: Any, stored: bool) -> None:
    """transformers 5 runs the words of a list together unless the tokenizer says `add_prefix_space`."""
    sentences = [["Zoë", "lives", "in", "Łódź"], ["in", "in", "Łódź", "Zoë"], ["Zoë,", "lives"]]
    text = " ".join(" ".join(words) for words in sentences)
    model = zoo.byte_level("m", "RobertaForTokenClassification", f" {text} {text}", labels=TAGS, change=zoo.noise(0.5))
    if stored:
        config = json.loads((model / "tokenizer_config.json").read_text())
        config.update(tokenizer_class="RobertaTokenizer", add_prefix_space=True)
        (model / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = transformers.AutoModelForTokenClassification.from_pretrained(model).eval()
    own = transformers.AutoTokenizer.from_pretrained(model)
    wanted = []
    for words in sentences:
        ids = own(" " + " ".join(words), return_tensors="pt")["input_ids"]
        firsts = [place for place, token in enumerate(own.convert_ids_to_tokens(ids[0])) if token.startswith("Ġ")]
        assert len(firsts) == len(words)
        with torch.no_grad():
            best = loaded(input_ids=ids).logits[0].argmax(-1).tolist()
        wanted.append([TAGS[best[place]] for place in firsts])
    assert len({tag for tags in wanted for tag in tags}) > 1
    data = zoo.table("data.jsonl", rows_of(sentences, wanted))
    result = evaluate(model, TAGGING, data=data)
    assert [row["candidate"] for row in result.predictions] == wanted


def test_words_that_bring_their_blank_get_no_second_one(zoo: Any) -> None:
    """SentencePiece models of the first Llama's kind put a mark before every word of a list by themselves."""
    made = Tokenizer(models.WordLevel({"[UNK]": 1, "▁w1": 5, "▁w2": 6, "▁": 7, "▁a": 8}, unk_token="[UNK]"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    folder = zoo.make("m", "LlamaForTokenClassification", words=None, labels=TAGS, bos_token_id=2, eos_token_id=3)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[UNK]", model_input_names=["input_ids", "attention_mask"]
    ).save_pretrained(folder)
    loaded = transformers.AutoModelForTokenClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        best = loaded(input_ids=torch.tensor([[5, 6, 6, 5, 6]])).logits[0].argmax(-1).tolist()
    data = zoo.table("data.jsonl", rows_of([["w1", "w2", "w2", "w1", "w2"]], [["O"] * 5]))
    (row,) = evaluate(folder, TAGGING, data=data).predictions
    assert row["candidate"] == [TAGS[index] for index in best] and len(set(best)) > 1


def test_tokenizers_that_pad_on_the_left(zoo: Any, sentences: list[list[str]]) -> None:
    model = zoo.causal("m", "LlamaForTokenClassification", left=True, labels=TAGS)
    data = zoo.table("data.jsonl", rows_of(sentences, [["O"] * len(words) for words in sentences]))
    alone, padded = (evaluate(model, TAGGING, data=data, batch_size=size).predictions for size in (1, 16))
    assert alone == padded and len({tag for row in alone for tag in row["candidate"]}) > 1
    noisy = zoo.causal("n", "LlamaForTokenClassification", left=True, labels=TAGS, change=zoo.noise(0.02))
    one, many = (evaluate(noisy, TAGGING, data=data, baseline=model, batch_size=size, **WEAK).kl for size in (1, 16))
    assert many == pytest.approx(one, rel=1e-4) and many is not None and many > 1e-4


def test_words_and_tags_must_pair(zoo: Any, tiny: Any) -> None:
    model = zoo.make("m", HEAD, labels=TAGS)
    for words, tags, why in (
        (["w1", "w2"], ["O"], "row 2 has 2 words and 1 tags"),
        ([], [], "row 2 has 0 words and 0 tags"),
        ("w1 w2", ["O", "O"], "row 2, column tokens holds str, not a list"),
        (["w1"], "O", "row 2, column tags holds str, not a list"),
    ):
        data = zoo.table("data.jsonl", rows_of([["w1"], words], [["O"], tags]))
        with pytest.raises(InputError, match=why):
            evaluate(model, TAGGING, data=data)
    data = zoo.table("data.jsonl", [{"sentence": "w1", "label": 0}])
    with pytest.raises(InputError, match=r"no column tokens or words; it has sentence, label: name it with --text-"):
        evaluate(model, TAGGING, data=data)
    with pytest.raises(InputError, match="made for classifying texts"):
        evaluate(tiny.model, TAGGING, data=data)
    with pytest.raises(UsageError, match=r"reads 1 --text-column, not 2"):
        evaluate(model, TAGGING, data=data, text_columns=["a", "b"])


def test_nan_is_no_tag_and_no_score(zoo: Any) -> None:
    def spoil(model: Any) -> None:
        model.bert.embeddings.word_embeddings.weight[5 + 59] = math.nan  # the word w59

    model, broken = zoo.make("m", HEAD, labels=TAGS), zoo.make("broken", HEAD, labels=TAGS, change=spoil)
    sentences = [["w1", "w2"], ["w3", "w59"]]
    data = zoo.table("data.jsonl", rows_of(sentences, [["B-PER", "O"], *tagged(model, sentences[1:])]))
    result = evaluate(broken, TAGGING, data=data, baseline=model, allow_weak_baseline=True)
    assert [row["candidate"] for row in result.predictions] == [*tagged(model, sentences[:1]), None]
    assert all(math.isnan(value or 0) for value in (result.candidate.value, result.drop, result.agreement, result.kl))
    assert len(Gate(100, 0, 0, 1e9).failures(result)) == 4


def test_files_and_json(zoo: Any, tmp_path: Path, sentences: list[list[str]]) -> None:
    model = zoo.make("m", HEAD, labels=TAGS)
    data = zoo.table("data.jsonl", rows_of(sentences, changed(tagged(model, sentences))))
    result = evaluate(model, TAGGING, data=data, baseline=model)
    body = json.loads(json.dumps(result.to_json(), allow_nan=False))
    again = Evaluation.from_json(body)
    assert again.to_json() == result.to_json() and again.interval == result.interval
    for name in ("p.jsonl", "p.csv"):
        write_predictions(result, tmp_path / name)
    lines = (tmp_path / "p.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.predictions
    with (tmp_path / "p.csv").open(newline="") as stream:
        cells = list(csv.DictReader(stream))
    assert [json.loads(row["candidate"]) for row in cells] == [row["candidate"] for row in result.predictions]
