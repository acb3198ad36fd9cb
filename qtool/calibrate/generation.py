"""Text that a language model writes itself, for calibration without anybody's data.

Causal models sample token after token (LLM-QAT: Liu et al. 2023, arXiv 2305.17888); masked models fill all-mask texts
and refill them, some positions at a time (Gibbs sampling: Wang & Cho 2019, arXiv 1902.04094). Tokens are drawn from the
model's softmax over ordinary tokens: special ones stand around a text, never in it, so a text that the model would end
goes on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qtool.calibrate.sources import room_for_text
from qtool.errors import InputError

GREEDY = 4
"""Behind a random first token so many are the model's most likely ones (LLM-QAT takes 3 to 5), the others are drawn."""

SWEEPS, GROUPS = 3, 8
"""How often a masked model goes over a text, and in how many groups of positions each time: an eighth of a text is
masked at once, about what such models were trained with."""

LOGIT_BYTES = 1 << 28
"""Of a masked model's logits at once: texts × tokens × vocabulary × 4."""


@dataclass(frozen=True)
class Alphabet:
    """Token ids that a text is made of.

    `ordinary` (int64, ascending) may stand anywhere; `prefix` and `suffix` are what the tokenizer puts around a text.
    `start` comes before a text of a causal model without a prefix, but does not belong to it; `mask` is None where the
    tokenizer has no such token.
    """

    ordinary: torch.Tensor
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    start: int | None = None
    mask: int | None = None

    @classmethod
    def of(cls, tokenizer: Any, vocab_size: int) -> "Alphabet":
        """From a tokenizer of transformers and the model's number of tokens.

        A token that begins and also ends texts (GPT-2's) separates them: what follows it is the start of a text. One
        that only begins texts counts where the tokenizer puts it there; elsewhere it means something else (in many
        models, a turn of a chat).
        """
        added = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]
        special = {*tokenizer.all_special_ids, *added}
        ordinary = sorted({index for index in tokenizer.get_vocab().values() if index < vocab_size} - special)
        if not ordinary:
            raise InputError(
                "the tokenizer has only special tokens, of which no text is made; use calibration.source=random"
            )
        prefix, suffix = _surroundings(tokenizer)
        separates = tokenizer.bos_token_id is not None and tokenizer.bos_token_id == tokenizer.eos_token_id
        start = tokenizer.bos_token_id if separates else None
        return cls(torch.tensor(ordinary), prefix, suffix, start, tokenizer.mask_token_id)

    def room(self, length: int) -> int:
        """How many ordinary tokens fit in a text of `length`. Raises InputError when none does."""
        return room_for_text(length, len(self.prefix) + len(self.suffix))


def _surroundings(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a tokenizer puts before and behind a text: by looking, since templates can be anything."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for begin in range(len(whole) - len(plain) + 1):
        end = begin + len(plain)
        if plain and whole[begin:end] == plain:
            return tuple(whole[:begin]), tuple(whole[end:])
    raise InputError("nobody can tell what the tokenizer puts around a text; calibrate on a file of texts instead")


def written_by(
    model: Any, alphabet: Alphabet, *, masked: bool, num_samples: int, batch_size: int, max_length: int, seed: int
) -> Iterator[torch.Tensor]:
    """Batches of `num_samples` texts, int64 `[batch, max_length]`, that a transformers model in eval mode writes.

    Texts are on the host, wherever the model is. `masked` models fill, others sample. The same seed and number of
    threads give the same tokens. Raises InputError where `max_length` leaves no room for text.
    """
    room = alphabet.room(max_length)
    generator = torch.Generator().manual_seed(seed)
    for begin in range(0, num_samples, batch_size):
        count = min(batch_size, num_samples - begin)
        if masked:
            yield _filled(model, alphabet, count, room, generator)
        else:
            text = _sampled(model, alphabet, count, room, generator)
            yield torch.cat([text, _column(alphabet.suffix, count)], dim=1)


def draw(logits: torch.Tensor, ordinary: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token for each row of `logits` `[rows, vocabulary]`, int64 `[rows]`, by their softmax over `ordinary`.

    A uniform number a row is looked up in the cumulated probabilities: `torch.multinomial` makes one a token.
    """
    cumulated = logits[:, ordinary].softmax(-1).double().cumsum(-1)
    drawn = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator) * cumulated[:, -1:]
    index = torch.searchsorted(cumulated, drawn, right=True).clamp_max(len(ordinary) - 1)
    return ordinary[index.squeeze(1)]


@torch.inference_mode()
def _sampled(model: Any, alphabet: Alphabet, count: int, room: int, generator: torch.Generator) -> torch.Tensor:
    """Prefix and `room` tokens: `[count, prefix + room]`. A model that keeps no cache reads all tokens again."""
    ordinary, lead = alphabet.ordinary, alphabet.prefix or ((alphabet.start,) if alphabet.start is not None else ())
    ids = _column(lead, count)
    greedy = 0
    if not lead:
        first = torch.randint(len(ordinary), (count, 1), generator=generator)
        ids, greedy = ordinary[first], 1 + GREEDY
    cache = None
    while ids.shape[1] < len(lead) + room:
        fed = ids if cache is None else ids[:, -1:]
        output = model(**_inputs(model, fed, ids), past_key_values=cache, use_cache=True, return_dict=True)
        cache, logits = output.get("past_key_values"), output.logits[:, -1].cpu()
        likely = ids.shape[1] < greedy
        chosen = ordinary[logits[:, ordinary].argmax(-1)] if likely else draw(logits, ordinary, generator)
        ids = torch.cat([ids, chosen.unsqueeze(1)], dim=1)
    return ids[:, len(lead) - len(alphabet.prefix) :]


def _inputs(model: Any, fed: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Ids that a model is given, of texts `ids` without padding, where it is."""
    return {"input_ids": fed.to(model.device), "attention_mask": torch.ones_like(ids).to(model.device)}


def _column(ids: Sequence[int], count: int) -> torch.Tensor:
    """`[count, len(ids)]`, all rows alike."""
    return torch.tensor(ids, dtype=torch.int64).expand(count, -1)


def _filled(model: Any, alphabet: Alphabet, count: int, room: int, generator: torch.Generator) -> torch.Tensor:
    """Masks between prefix and suffix become words: in each sweep every position of a text is drawn once, in an order
    of its own, given all that stands there by then. `[count, prefix + room + suffix]`."""
    before = len(alphabet.prefix)
    ids = torch.cat([_column((*alphabet.prefix, *[_mask(alphabet)] * room, *alphabet.suffix), count)], dim=1)
    for _ in range(SWEEPS):
        order = torch.rand(count, room, generator=generator).argsort(dim=1) + before
        for positions in order.tensor_split(min(GROUPS, room), dim=1):
            ids = refilled(model, ids, positions, alphabet, generator)
    return ids


def _mask(alphabet: Alphabet) -> int:
    assert alphabet.mask is not None, "a masked model's tokenizer has a mask token"
    return alphabet.mask


@torch.inference_mode()
def refilled(
    model: Any, ids: torch.Tensor, positions: torch.Tensor, alphabet: Alphabet, generator: torch.Generator
) -> torch.Tensor:
    """`ids` `[texts, tokens]` with the tokens at `positions` `[texts, n]` masked and drawn anew, all at once."""
    masked = ids.scatter(1, positions, _mask(alphabet))
    rows = max(1, LOGIT_BYTES // (4 * ids.shape[1] * model.config.vocab_size))
    found = []
    for some, where in zip(masked.split(rows), positions.split(rows), strict=True):
        logits = model(**_inputs(model, some, some), return_dict=True).logits
        wanted = logits.gather(1, where.to(logits.device).unsqueeze(2).expand(-1, -1, logits.shape[2])).cpu()
        found.append(draw(wanted.flatten(0, 1), alphabet.ordinary, generator).view_as(where))
    return masked.scatter(1, positions, torch.cat(found))
