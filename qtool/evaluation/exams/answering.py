"""Extractive question answering: the span of a context that answers a question (SQuAD v1.1, Rajpurkar et al. 2016)."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from qtool.errors import InputError
from qtool.evaluation.batches import check_rows, rows_of
from qtool.evaluation.exams.base import Batch, Exam, Request, Tokens
from qtool.evaluation.tasks import Task, load_rows
from qtool.rows import Row, find_text_columns, texts_of

if TYPE_CHECKING:
    from qtool.evaluation.sides import Side

ANSWER_TOKENS = 30
"""The longest answer that is considered, as in the usual evaluation of SQuAD."""

DOC_STRIDE = 128
"""Tokens that neighbouring windows share unless asked otherwise."""


@dataclass(frozen=True)
class Window:
    """A stretch of a context: which question, and of each token its characters in the context (−1: not of it)."""

    question: int
    spans: NDArray[np.int64]


@dataclass(frozen=True)
class Span:
    """A candidate answer: sum of its start and end logits, question, and text."""

    score: float
    question: int
    text: str


class QuestionAnswering(Exam):
    """Spans of one or several windows of a context, the best by start logit + end logit.

    Every span of at most `ANSWER_TOKENS` tokens of the context is considered. A long context is cut into windows that
    share `doc_stride` tokens (128 if not said, at most half a window, as transformers has it); with 0 there is one
    window, and what does not fit is not read.
    """

    heads = ("ForQuestionAnswering",)
    loader = "AutoModelForQuestionAnswering"
    takes = frozenset({"doc_stride", "n_best"})
    distributes = True
    max_length = 384
    unit = "questions"

    def __init__(self, task: Task, request: Request) -> None:
        """Raises InputError for rows without question, context or answers."""
        super().__init__(task, request)
        rows, self.source = load_rows(task, request.data, self.split, request.limit)
        columns = find_text_columns(rows, self.source, request.text_columns or task.text_columns)
        if len(columns) != 2:
            raise InputError(f"{self.source}: a question needs two columns, question and context, not {columns[0]}")
        self.pairs = texts_of(rows, columns, self.source)
        column = request.label_column or task.label_column or "answers"
        self.references = [
            _gold(row, column, f"{self.source}: row {number}") for number, row in enumerate(rows, start=1)
        ]
        self.n_best = request.n_best or 1

    def encode(self, tokenizer: Any, config: Any, length: int | None, model: str) -> tuple[list[Tokens], list[Any]]:
        """One row a window. Raises InputError where a question leaves no room for its context."""
        if not tokenizer.is_fast:
            raise InputError(f"the tokenizer of {model} gives no positions in the text; it needs a tokenizer.json")
        questions, contexts = [pair[0].lstrip() for pair in self.pairs], [pair[1] for pair in self.pairs]
        cut = length if length is not None else tokenizer.model_max_length
        asked = self.request.doc_stride
        stride = min(DOC_STRIDE, cut // 2) if asked is None else asked
        most = self._check_room(tokenizer, questions, contexts, cut, stride)
        windows = {"stride": min(stride, most), "return_overflowing_tokens": True} if stride else {}
        self.used = {"doc_stride": windows.get("stride", 0), "n_best": self.n_best}
        encoded = tokenizer(
            questions,
            contexts,
            truncation="only_second",
            max_length=cut,
            return_offsets_mapping=True,
            return_attention_mask=True,
            **windows,
        )
        origins = encoded.pop("overflow_to_sample_mapping", range(len(questions)))
        offsets = encoded.pop("offset_mapping")
        about = [
            Window(question, _spans(offsets[index], encoded.sequence_ids(index)))
            for index, question in enumerate(origins)
        ]
        rows = rows_of(dict(encoded), config)
        check_rows(rows, config, model)
        return rows, about

    def _check_room(
        self, tokenizer: Any, questions: Sequence[str], contexts: Sequence[str], cut: int, stride: int
    ) -> int:
        """The widest overlap that windows of `cut` tokens can have. Raises InputError where one has no new tokens.

        Asked before, because the tokenizers library panics, with a backtrace, over an overlap that a question makes
        too wide.
        """
        room: int = cut - tokenizer.num_special_tokens_to_add(pair=True)
        alone = tokenizer(questions, add_special_tokens=False, verbose=False)["input_ids"]
        for number, ids in enumerate(alone):
            tight = room - len(ids) <= stride
            if tight and len(tokenizer(questions[number], contexts[number], verbose=False)["input_ids"]) > cut:
                less = f" (overlap {stride}), or less overlap with --doc-stride" if room > len(ids) else ""
                raise InputError(
                    f"{self.source}: row {number + 1}: a question of {len(ids)} tokens leaves no room for its context "
                    f"within {cut} tokens; allow more with --max-length{less}"
                )
        return room - 1

    def collect(self, side: "Side", output: Any, batch: Batch, about: list[Any]) -> list[Any]:
        """The best spans of each window; None where logits are NaN."""
        both = [scores.double().numpy() for scores in _unpadded(side, output, about)]
        return [self._best(window, start, end) for window, (start, end) in zip(about, both, strict=True)]

    def logits(self, side: "Side", output: Any, batch: Batch, about: list[Any]) -> list[torch.Tensor]:
        """Two places a window, where an answer starts and where it ends, over the tokens of the context."""
        kept = []
        for window, scores in zip(about, _unpadded(side, output, about), strict=True):
            inside = torch.from_numpy(np.flatnonzero(window.spans[:, 0] >= 0))
            # As in `_best`, NaN anywhere says that nothing is known; a window without tokens of the context, nothing.
            known = torch.where(scores.isnan().any(), torch.nan, scores[:, inside])
            kept.append(known if len(inside) else known[:0])
        return kept

    def divergences(self, side: "Side") -> list[float]:
        """Of each question the mean over its windows of start's and end's divergence, which is that of their pair."""
        found: list[list[float]] = [[] for _ in self.references]
        for window, places in zip(side.about, side.divergences, strict=True):
            found[window.question] += [float(places.sum())] if len(places) else []
        return [math.fsum(windows) / len(windows) for windows in found if windows]

    def _best(self, window: Window, start: NDArray[np.float64], end: NDArray[np.float64]) -> list[Span] | None:
        """The `n_best` spans with different texts."""
        inside = np.flatnonzero(window.spans[:, 0] >= 0)
        if np.isnan(start).any() or np.isnan(end).any():
            return None
        if not len(inside):
            return []
        first = inside[0]
        begins, finishes = start[inside], end[inside]
        size = len(inside)
        # scores[i, k] is the span of tokens i … i + k.
        padded = np.concatenate([finishes, np.full(ANSWER_TOKENS - 1, -np.inf)])
        scores = begins[:, None] + np.lib.stride_tricks.sliding_window_view(padded, ANSWER_TOKENS)
        context = self.pairs[window.question][1]
        best: dict[str, Span] = {}
        for place in np.argsort(-scores, axis=None, kind="stable"):
            token, extra = divmod(int(place), ANSWER_TOKENS)
            if token + extra < size:
                text = context[window.spans[first + token, 0] : window.spans[first + token + extra, 1]]
                best.setdefault(text, Span(float(scores[token, extra]), window.question, text))
            if len(best) == self.n_best:
                break
        return list(best.values())

    def candidates(self, side: "Side") -> list[list[Span] | None]:
        """The `n_best` spans of each question over all of its windows, the best first, each text once.

        None where a window gave NaN: whether it held the answer is not known.
        """
        found: list[list[Span]] = [[] for _ in self.references]
        broken: set[int] = set()
        for window, spans in zip(side.about, side.collected, strict=True):
            found[window.question] += spans or []
            broken |= {window.question} if spans is None else set()
        return [None if index in broken else _distinct(spans, self.n_best) for index, spans in enumerate(found)]

    def answers(self, side: "Side") -> list[Any]:
        """The best text of each question, empty for a context without tokens; None where it is missing."""
        return [None if spans is None else spans[0].text if spans else "" for spans in self.candidates(side)]

    def rows(self, sides: "Sequence[Side]") -> list[dict[str, Any]]:
        """With `n_best` above 1 also the candidate's other answers with their scores."""
        rows = super().rows(sides)
        if self.n_best > 1:
            for row, spans in zip(rows, self.candidates(sides[-1]), strict=True):
                row["n_best"] = [{"text": span.text, "score": self.shown(span.score)} for span in spans or []]
        return rows


def _gold(row: Row, column: str, where: str) -> list[str]:
    """The texts of the answers, from SQuAD's `{"text": […], "answer_start": […]}`, a list of texts, or one text."""
    value = row.get(column)
    texts = value.get("text") if isinstance(value, dict) else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(
            f"{where} has no answers in column {column} (SQuAD v1.1: every question has one); "
            "name their column with --label-column"
        )
    return texts


def _unpadded(side: "Side", output: Any, about: Sequence[Window]) -> list[torch.Tensor]:
    """Start and end logits `[2, tokens]` of each window."""
    both = torch.stack([output.start_logits, output.end_logits], dim=1)
    # A tokenizer that pads on the left moves the tokens of shorter rows to the right.
    left = side.tokenizer.padding_side == "left"
    sizes = [len(window.spans) for window in about]
    return [row[:, -size:] if left else row[:, :size] for row, size in zip(both, sizes, strict=True)]


def _spans(offsets: Sequence[tuple[int, int]], parts: Sequence[int | None]) -> NDArray[np.int64]:
    """Characters `[tokens, 2]` of the context; −1 for tokens of the question and of the tokenizer."""
    return np.asarray(
        [offset if part == 1 else (-1, -1) for offset, part in zip(offsets, parts, strict=True)], dtype=np.int64
    )


def _distinct(spans: list[Span], count: int) -> list[Span]:
    """The best ones; of equal scores the earlier window's, of equal texts the better."""
    ranked = heapq.nsmallest(len(spans), spans, key=lambda span: -span.score)
    best: dict[str, Span] = {}
    for span in ranked:
        best.setdefault(span.text, span)
    return list(best.values())[:count]
