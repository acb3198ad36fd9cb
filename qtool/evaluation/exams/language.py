"""Language models: perplexity of a text, and how many masked tokens are guessed."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from qtool.anatomy import FAMILIES
from qtool.errors import InputError, UsageError
from qtool.evaluation.batches import check_rows, encode
from qtool.evaluation.exams.base import Batch, Exam, Request, Tokens, scores_at
from qtool.evaluation.tasks import Task, load_running_text, load_single_texts

if TYPE_CHECKING:
    from qtool.evaluation.sides import Side

_BATCH_TOKENS = 4096
"""Tokens of a batch unless asked otherwise: logits over a large vocabulary take more memory than the model."""


class Perplexity(Exam):
    """exp of the mean negative log-likelihood of the tokens of a running text, under any causal language model.

    The text is tokenized whole and read in windows of `max_length` tokens that move by `stride` (default: a window, so
    nothing is read twice). A window scores the tokens that no earlier one scored, and never its first: a shorter stride
    gives every token more context, and costs as many times more. A last, partial window is dropped.
    """

    heads = ("ForCausalLM", "LMHeadModel")
    loader = "AutoModelForCausalLM"
    takes = frozenset({"stride"})
    distributes = True
    columns, labelled = 1, False
    max_length = 1024
    unit = "tokens"
    same_tokens = True

    def __init__(self, task: Task, request: Request) -> None:
        """`limit` counts windows."""
        super().__init__(task, request)
        if request.max_length == 1:
            raise UsageError("a window must have at least 2 tokens, the first of which is never scored")
        self.text, self.source = load_running_text(task, request.data, self.split, request.text_columns)
        self.vocabulary = 0

    @property
    def n(self) -> int:
        """Tokens that are scored."""
        return int(sum(self.references))

    def check_subjects(self, subjects: Sequence[Any]) -> None:
        """An encoder in a decoder's clothes sees the tokens that it should guess."""
        for item in subjects:
            family = FAMILIES.get(item.config.model_type)
            if family and not family.decoder and not getattr(item.config, "is_decoder", False):
                raise InputError(
                    f"{item.name} reads text in both directions (is_decoder is false in its config.json): it sees the "
                    "tokens that it should guess, and its perplexity means nothing"
                )

    def batch_size(self) -> int:
        """Few, long rows."""
        return self.request.batch_size or max(1, _BATCH_TOKENS // self.window)

    def encode(self, tokenizer: Any, config: Any, length: int | None, model: str) -> tuple[list[Tokens], list[Any]]:
        """One row a window; beside it how many of its last tokens are scored. Raises InputError for a short text."""
        self.window = window = min(self.length, length or self.length)
        step = min(self.request.stride or window, window)
        self.used = {"stride": step}
        ids = tokenizer(self.text, verbose=False)["input_ids"]
        if window < 2 or len(ids) < 2:
            raise InputError(f"{self.source} gives {len(ids)} tokens in windows of {window}: at least two are needed")
        begins = range(0, max(len(ids) - window, 0) + 1, step)[: self.request.limit]
        rows = [{"input_ids": ids[begin : begin + window]} for begin in begins]
        for row in rows:
            row["attention_mask"] = [1] * len(row["input_ids"])
        check_rows(rows, config, model)
        first = len(rows[0]["input_ids"]) - 1
        self.references = [first, *(min(step, first) for _ in rows[1:])]
        self.vocabulary = config.vocab_size
        return rows, list(self.references)

    def collect(self, side: "Side", output: Any, batch: Batch, about: list[Any]) -> list[Any]:
        """Of each window the sum of negative log-likelihoods in nats, and the most likely token at each place.

        −1 is the token where logits are NaN.
        """
        kept = []
        for scores, ids, count in zip(self.logits(side, output, batch, about), batch["input_ids"], about, strict=True):
            scores, targets = scores.float(), ids[-count:]
            losses = torch.nn.functional.cross_entropy(scores, targets, reduction="none")
            choices = torch.where(losses.isnan(), -1, scores.argmax(dim=-1))
            kept.append((float(losses.double().sum()), choices.tolist()))
        return kept

    def comparable(self, sides: "Sequence[Side]") -> bool:
        """Only with vocabularies of the same size."""
        return super().comparable(sides) and _same_vocabulary(sides)

    def logits(self, side: "Side", output: Any, batch: Batch, about: list[Any]) -> list[torch.Tensor]:
        """A place a scored token, over the vocabulary."""
        return [logits[-count - 1 : -1] for logits, count in zip(output.logits, about, strict=True)]

    def answers(self, side: "Side") -> list[Any]:
        """Sums of negative log-likelihoods."""
        return [loss for loss, _ in side.collected]

    def choices(self, side: "Side") -> list[Any] | None:
        """Teacher-forced top-1 tokens."""
        return [token for _, tokens in side.collected for token in tokens]

    def floor(self) -> float:
        """All tokens alike."""
        return float(self.vocabulary)

    def rows(self, sides: "Sequence[Side]") -> list[dict[str, Any]]:
        """Mean negative log-likelihood of each window's scored tokens."""
        means = [
            [self.shown(loss / count) for loss, count in zip(self.answers(side), self.references, strict=True)]
            for side in sides
        ]
        theirs = means[0] if len(sides) > 1 else [None] * len(self.references)
        return [
            {"index": index, "tokens": count, "baseline": other, "candidate": own}
            for index, (count, other, own) in enumerate(zip(self.references, theirs, means[-1], strict=True))
        ]


class MaskedLanguage(Exam):
    """How many of the tokens behind the mask a model guesses: 15 % of each text, chosen once, all replaced by the mask.

    The share is BERT's (Devlin et al. 2019); its 80/10/10 mix belongs to training.
    """

    heads = ("ForMaskedLM",)
    loader = "AutoModelForMaskedLM"
    columns, labelled = 1, False
    unit = "texts"
    same_tokens = True
    distributes = True

    def __init__(self, task: Task, request: Request) -> None:
        """Errors of `load_single_texts`."""
        super().__init__(task, request)
        self.texts, self.source = load_single_texts(task, request.data, self.split, request.limit, request.text_columns)

    def encode(self, tokenizer: Any, config: Any, length: int | None, model: str) -> tuple[list[Tokens], list[Any]]:
        """One row a text; beside it the masked places. Raises InputError for a tokenizer without a mask."""
        if tokenizer.mask_token_id is None:
            raise InputError(f"the tokenizer of {model} has no mask token")
        rows = encode(tokenizer, config, self.texts, length, model)
        special = set(tokenizer.all_special_ids)
        about, kept, self.references = [], [], []
        for number, row in enumerate(rows):
            ids = row["input_ids"]
            places = _masked([place for place, token in enumerate(ids) if token not in special], number)
            if places:
                about.append(places)
                self.references.append([ids[place] for place in places])
                kept.append(
                    {**row, "input_ids": [tokenizer.mask_token_id if i in places else t for i, t in enumerate(ids)]}
                )
        if not kept:
            raise InputError(f"{self.source} holds no text whose tokens could be masked")
        return kept, about

    def collect(self, side: "Side", output: Any, batch: Batch, about: list[Any]) -> list[Any]:
        """The most likely token at each masked place; −1 where logits are NaN."""
        found = self.logits(side, output, batch, about)
        return [torch.where(scores.isnan().any(dim=-1), -1, scores.argmax(dim=-1)).tolist() for scores in found]

    def comparable(self, sides: "Sequence[Side]") -> bool:
        """Only with vocabularies of the same size."""
        return super().comparable(sides) and _same_vocabulary(sides)

    def logits(self, side: "Side", output: Any, batch: Batch, about: list[Any]) -> list[torch.Tensor]:
        """A place a masked token, over the vocabulary."""
        return scores_at(side, output, batch, about)

    def choices(self, side: "Side") -> list[Any] | None:
        """Guessed tokens, one after the other."""
        return [token for tokens in self.answers(side) for token in tokens]

    def floor(self) -> float:
        """Always the most frequent token."""
        every = [token for tokens in self.references for token in tokens]
        return 100.0 * max(Counter(every).values()) / len(every)


def _same_vocabulary(sides: "Sequence[Side]") -> bool:
    return len({side.subject.config.vocab_size for side in sides}) == 1


def _masked(places: Sequence[int], number: int) -> list[int]:
    """15 % of `places`, at least one, the same for the same text number on every machine."""
    draw = random.Random(f"mask:{number}")
    count = math.ceil(0.15 * len(places))
    # Sorted by random(), whose sequence Python guarantees, where sample()'s is not.
    return sorted(sorted(places, key=lambda place: draw.random())[:count])
