"""Token classification: a tag for every word, scored by whole entities (CoNLL-2003, Tjong Kim Sang and De Meulder)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from qtool.errors import InputError
from qtool.evaluation.batches import check_rows, rows_of
from qtool.evaluation.exams.base import Batch, Exam, Progress, Request, Tokens, scores_at
from qtool.evaluation.labels import counted, head_names
from qtool.evaluation.tasks import Task, load_rows
from qtool.rows import WORD_COLUMNS, Row

if TYPE_CHECKING:
    from qtool.evaluation.sides import Side

TAG_COLUMNS = ("tags", "ner_tags", "labels")
"""Where tags are looked for."""

_OUTSIDE = "O"


class TokenClassification(Exam):
    """The tag of a word is what the model says of its first token; words that are cut off count as outside (O)."""

    heads = ("ForTokenClassification",)
    loader = "AutoModelForTokenClassification"
    unit = "sentences"
    columns = 1
    distributes = True

    def __init__(self, task: Task, request: Request) -> None:
        """Raises InputError for rows without words or with another number of tags than words."""
        super().__init__(task, request)
        rows, self.source = load_rows(task, request.data, self.split, request.limit)
        words = _column(rows, request.text_columns or task.text_columns or WORD_COLUMNS, self.source, "text")
        wanted = request.label_column or task.label_column
        tags = _column(rows, (wanted,) if wanted else TAG_COLUMNS, self.source, "label")
        self.words = [_listed(row, words, self.source, number) for number, row in enumerate(rows, start=1)]
        self.tags = [_listed(row, tags, self.source, number) for number, row in enumerate(rows, start=1)]
        for number, (own, theirs) in enumerate(zip(self.words, self.tags, strict=True), start=1):
            if len(own) != len(theirs) or not own:
                raise InputError(f"{self.source}: row {number} has {len(own)} words and {len(theirs)} tags")

    @property
    def n(self) -> int:
        """Sentences."""
        return len(self.words)

    def encode(self, tokenizer: Any, config: Any, length: int | None, model: str) -> tuple[list[Tokens], list[Any]]:
        """One row a sentence; beside it the positions of first tokens by word."""
        if not tokenizer.is_fast:
            raise InputError(f"the tokenizer of {model} does not tell words apart; it needs a tokenizer.json")
        own = tokenizer.num_special_tokens_to_add()
        if length is not None and length <= own:
            raise InputError(f"a maximum length of {length} leaves no room for words; allow more with --max-length")
        limit = {"truncation": True, "max_length": length} if length is not None else {}
        blank = _blank(tokenizer)
        words = [[f"{blank}{word}" for word in sentence] for sentence in self.words]
        encoded = tokenizer(words, is_split_into_words=True, return_attention_mask=True, **limit)
        about = [_first_tokens(encoded.word_ids(index)) for index in range(len(self.words))]
        rows = rows_of(dict(encoded), config)
        check_rows(rows, config, model)
        return rows, about

    def prepare(self, sides: "Sequence[Side]", report: Progress) -> None:
        """Tags by name: those of the data must be known to every head."""
        for side in sides:
            side.reading = head_names(side.subject.config)
            if counted(side.reading) is not None:
                raise InputError(
                    f"wrong task for the head: {side.subject.name} does not name its tags ({side.reading[0]}, …); "
                    "write names such as B-PER into id2label of its config.json"
                )
        self.references = [[self._name(tag, sides[0].reading) for tag in tags] for tags in self.tags]
        for side in sides:
            known = set(side.reading)
            unknown = sorted({tag for tags in self.references for tag in tags} - known)
            if unknown:
                raise InputError(
                    f"wrong task for the head: {self.source} has the tag {unknown[0]}, "
                    f"{side.subject.name} knows {', '.join(side.reading)}"
                )

    def _name(self, tag: Any, head: Sequence[str]) -> str:
        """A tag that is a number is the position in the task's names, or in those of the first model's head."""
        names = self.task.labels or head
        if not isinstance(tag, int):
            return str(tag)
        if not 0 <= tag < len(names):
            raise InputError(f"{self.source} has the tag {tag}, and there are {len(names)} names")
        return names[tag]

    def collect(self, side: "Side", output: Any, batch: Batch, about: list[Any]) -> list[Any]:
        """Tags by word index; None for a sentence with NaN."""
        found = scores_at(side, output, batch, [list(firsts.values()) for firsts in about])
        kept: list[Any] = []
        for firsts, scores in zip(about, found, strict=True):
            names = [side.reading[label] for label in scores.argmax(dim=1)]
            kept.append(None if scores.isnan().any() else dict(zip(firsts, names, strict=True)))
        return kept

    def comparable(self, sides: "Sequence[Side]") -> bool:
        """Only with the same tags."""
        named = [set(side.reading) for side in sides]
        distinct = len(named[0]) == len(sides[0].reading) == len(sides[-1].reading)
        return super().comparable(sides) and distinct and named[0] == named[-1]

    def logits(self, side: "Side", output: Any, batch: Batch, about: list[Any]) -> list[torch.Tensor]:
        """A place a word that the model has read, tags in alphabetical order."""
        order = sorted(range(len(side.reading)), key=side.reading.__getitem__)
        found = scores_at(side, output, batch, [list(firsts.values()) for firsts in about])
        return [scores[:, order] for scores in found]

    def answers(self, side: "Side") -> list[Any]:
        """A list of tags a sentence, as long as the reference."""
        return [
            None if found is None else [found.get(word, _OUTSIDE) for word in range(len(words))]
            for found, words in zip(side.collected, self.words, strict=True)
        ]

    def choices(self, side: "Side") -> list[Any] | None:
        """Tags, one word after the other; None for each of a sentence without an answer."""
        answers = zip(self.answers(side), self.words, strict=True)
        return [tag for tags, words in answers for tag in tags or [None] * len(words)]


def _column(rows: Sequence[Row], names: Sequence[str], source: str, what: str) -> str:
    found = next((name for name in names if name in rows[0]), None)
    if found is None:
        raise InputError(
            f"{source} has no column {' or '.join(names)}; it has {', '.join(rows[0])}: "
            f"name it with --{what}-column, or pass a .conll file"
        )
    return found


def _listed(row: Row, column: str, source: str, number: int) -> list[Any]:
    value = row[column]
    if not isinstance(value, list):
        raise InputError(
            f"{source}: row {number}, column {column} holds {type(value).__name__}, not a list, one a word"
        )
    return value


def _blank(tokenizer: Any) -> str:
    """What goes before a word so that it gives the same tokens as in running text.

    A byte-level tokenizer (RoBERTa's, GPT-2's) without `add_prefix_space` would run the words of a list together.
    """
    text, words = (
        tokenizer(given, add_special_tokens=False, is_split_into_words=isinstance(given, list))["input_ids"]
        for given in ("a a", ["a", "a"])
    )
    return "" if text == words else " "


def _first_tokens(word_ids: Sequence[int | None]) -> dict[int, int]:
    """Word → position of its first token, of the words that have one."""
    firsts: dict[int, int] = {}
    for position, word in enumerate(word_ids):
        if word is not None:
            firsts.setdefault(word, position)
    return firsts
