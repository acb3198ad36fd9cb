"""The demo's labelled set: synthetic sentiment sentences, made from our own frames and vocabulary.

Nothing here is a real review: every sentence is synthetic, written for qtool either in full or as a frame with slots.
The set exists so that `qtool demo` can compare a quantized classifier with its float parent without a download; frames
and phrases were chosen so that a small float model gets about nine in ten right, so the score says nothing about how
good a model is elsewhere. `python -m qtool.demo.generate` writes `sentences.jsonl` beside this file, one object a line
with the columns `sentence` and `label` (0 negative, 1 positive).

A label is what a careful reader would say of the whole sentence. Frames are symmetric where English allows it: `=` in
a slot asks for a phrase of the label's own polarity and `!` for the opposite one, so that "anything but {adj!}" is
praise and blame in turn. A seed gives the same bytes on every Python version, because `random.Random(seed).random()`
is the only source of chance and its sequence is guaranteed.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

SEED: Final = 20
FILE: Final = Path(__file__).with_name("sentences.jsonl")


def _sections() -> dict[str, str]:
    """The parts of language.txt.

    subjects: one paragraph a subject, fields `key: phrase / phrase` (`adj` adjectives, `np` noun phrases, `clause`
    judgements, `but` minor points that never outweigh a judgement; + praises, - blames). common: phrases that fit every
    subject. frames: `# kind, sentences of it a label`, then frames (= for both labels, + and - for one). written:
    sentences written out in full, + praise and - blame.
    """
    blocks = Path(__file__).with_name("language.txt").read_text("utf-8").split("=== ")[1:]
    return {name: text.strip() for name, _, text in (block.partition("\n") for block in blocks)}


_LANGUAGE: Final = _sections()

# Phrases that fit every subject.
_TENSES: Final = {
    "present": {"is": "is", "has": "has", "does": "does", "seems": "seems", "remains": "remains", "makes": "makes"},
    "past": {"is": "was", "has": "had", "does": "did", "seems": "seemed", "remains": "remained", "makes": "made"},
}

_SLOT: Final = re.compile(r"\{(a )?([a-z]+)([=!+-]?)\}")
_CONTENT: Final = re.compile(
    r"\b(?!(?:that|with|from|like|have|than|them|they|were|what|when|more|half|into|every|never|could|would|nobody)\b)"
    r"[a-z]{4,}"
)
_T = TypeVar("_T")


class Labelled(NamedTuple):
    """One sentence of the set: its linguistic `kind`, its text, and 1 for praise or 0 for blame."""

    kind: str
    sentence: str
    label: int


def sentences(seed: int = SEED) -> list[dict[str, str | int]]:
    """The rows of the set in file order: `sentence` (3 to 40 words, unique) and `label` (0 negative, 1 positive).

    All of them are synthetic. The same seed gives the same rows on every Python version and platform.
    """
    return [{"sentence": row.sentence, "label": row.label} for row in labelled(seed)]


def labelled(seed: int = SEED) -> list[Labelled]:
    """The rows of `sentences` with the kind of difficulty each was written for, as many of either label."""
    chance = random.Random(seed)
    rows = [Labelled("written", text, label) for text, label in _written()]
    seen = {_normal(row.sentence) for row in rows}
    writer = _Writer(chance)
    for kind, count, frames in _kinds():
        for label in (0, 1):
            rows += _fill(writer, kind, frames[label], count, label, seen)
    return _shuffled(rows, chance)


def main() -> None:
    """Writes `sentences.jsonl` beside this file."""
    FILE.write_bytes(encode(sentences()))


def encode(rows: Sequence[dict[str, str | int]]) -> bytes:
    """The bytes of the JSON Lines file with these rows: UTF-8, one object a line, every line ended."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


class _Deck:
    """Deals phrases in shuffled rounds, so that all of them are used about equally often."""

    def __init__(self, phrases: Sequence[str], chance: random.Random) -> None:
        self._phrases, self._chance, self._left = phrases, chance, list[str]()

    def deal(self, avoid: set[str]) -> str:
        """The next phrase that shares no content word with `avoid`, or simply the next where all of them do."""
        if not self._left:
            self._left = _shuffled(self._phrases, self._chance)
        free = [phrase for phrase in self._left if not _content(phrase) & avoid]
        phrase = (free or self._left)[0]
        self._left.remove(phrase)
        return phrase


class _Writer:
    """Fills frames; subjects, nouns and phrases all come from decks."""

    def __init__(self, chance: random.Random) -> None:
        self._common = {key: _Deck(phrases, chance) for key, phrases in _table(_LANGUAGE["common"]).items()}
        self._subjects = [
            {key: _Deck(phrases, chance) for key, phrases in _table(block).items()}
            for block in _LANGUAGE["subjects"].split("\n\n")
        ]
        self._turns = _Deck([str(index) for index in range(len(self._subjects))], chance)

    def write(self, frame: str, label: int) -> str:
        """The frame with every slot filled for this label, as a sentence with capitals in place."""
        decks = self._common | self._subjects[int(self._turns.deal(set()))]
        used: set[str] = set()
        words = dict(_TENSES[decks["tense"].deal(set())])
        words["n"] = decks["n"].deal(set())
        words["it"] = f"the {words['n']}"

        def fill(slot: re.Match[str]) -> str:
            article, name, polarity = slot.groups()
            text = words.get(name) or decks[name + _sign(polarity, label)].deal(used)
            used.update(_content(text))
            return f"{_article(text)} {text}" if article else text

        return _capitals(_SLOT.sub(fill, frame))


def _fill(writer: _Writer, kind: str, frames: list[str], count: int, label: int, seen: set[str]) -> list[Labelled]:
    """`count` new sentences of one kind and label, the frames taken in turn; `seen` grows by them."""
    rows: list[Labelled] = []
    turn = 0
    while len(rows) < count:
        sentence = writer.write(frames[turn % len(frames)], label)
        turn += 1
        if _normal(sentence) not in seen and 3 <= len(sentence.split()) <= 40:
            seen.add(_normal(sentence))
            rows.append(Labelled(kind, sentence, label))
    return rows


def _kinds() -> list[tuple[str, int, tuple[list[str], list[str]]]]:
    """Every kind: its name, how many sentences of either label, and the frames of label 0 and of label 1."""
    kinds: list[tuple[str, int, tuple[list[str], list[str]]]] = []
    for block in _LANGUAGE["frames"].split("\n\n"):
        head, *lines = block.splitlines()
        _, name, count = head.split()
        frames = tuple([line[2:] for line in lines if line[0] in signs] for signs in ("=-", "=+"))
        kinds.append((name, int(count), (frames[0], frames[1])))
    return kinds


def _written() -> list[tuple[str, int]]:
    """The sentences written out in full, each with its label."""
    lines = _LANGUAGE["written"].splitlines()
    return [(text, int(line[0] == "+")) for line in lines for text in line[2:].split(" / ")]


def _table(block: str) -> dict[str, list[str]]:
    """A block of `key: phrase / phrase` fields, ended by ` | ` or a line's end; an indented line goes on."""
    fields = re.split(r" \| |\n", block.strip().replace("\n  ", " "))
    pairs = (field.split(": ") for field in fields)
    return {key: phrases.split(" / ") for key, phrases in pairs}


def _sign(polarity: str, label: int) -> str:
    """The key's suffix for a slot's polarity mark: `=` the label's own, `!` the opposite one."""
    return {"=": "-+"[label], "!": "+-"[label]}.get(polarity, polarity)


def _content(phrase: str) -> set[str]:
    """The words that would sound repeated, or contradicted, within one sentence."""
    return {word.rstrip("s") for word in _CONTENT.findall(phrase)}


def _article(text: str) -> str:
    return "an" if re.match(r"(?!use|uni[^mn])[aeiou]|honest|hour", text) else "a"


def _capitals(text: str) -> str:
    return re.sub(r"(^|[.?!] )([a-z])", lambda match: match[1] + match[2].upper(), text)


def _normal(sentence: str) -> str:
    """Lower case without punctuation, for telling two sentences apart."""
    return " ".join(re.findall(r"[a-z0-9]+", sentence.lower()))


def _shuffled(items: Sequence[_T], chance: random.Random) -> list[_T]:
    """A Fisher-Yates shuffle on `chance.random()` alone; `random.shuffle` may change between Python versions."""
    result = list(items)
    for last in range(len(result) - 1, 0, -1):
        other = int(chance.random() * (last + 1))
        result[last], result[other] = result[other], result[last]
    return result


if __name__ == "__main__":
    main()
