"""Aligning the labels of data, task and model heads by name.

A head may list its classes in another order than the task, so an index alone means nothing; names decide, whatever
their case. Names that only count (`LABEL_0`, `0`) stand for their number.
"""

import re
from collections.abc import Sequence
from typing import Any

from qtool.errors import InputError

_COUNTED = re.compile(r"(?:label[ _-]?)?(\d+)", re.IGNORECASE)


def head_names(config: Any) -> tuple[str, ...]:
    """The class names of a classification head, by output index, from `config.id2label`."""
    return tuple(str(name) for _, name in sorted(config.id2label.items(), key=lambda item: int(item[0])))


def counted(names: Sequence[str]) -> list[int] | None:
    """The numbers in names such as `LABEL_1`, when they are 0 … n−1 in any order; else None."""
    matches = [_COUNTED.fullmatch(name.strip()) for name in names]
    numbers = [int(match[1]) for match in matches if match]
    return numbers if sorted(numbers) == list(range(len(names))) else None


def reference_names(task_names: Sequence[str] | None, heads: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The names whose order gives the integer labels their meaning: the task's, else those of the first head that has
    telling ones, else the first head's `LABEL_0`, `LABEL_1`, … in the order of their numbers."""
    if task_names:
        return tuple(task_names)
    telling = [head for head in heads if counted(head) is None]
    return telling[0] if telling else tuple(f"LABEL_{index}" for index in range(len(heads[0])))


def data_names(task_names: Sequence[str] | None, labels: Sequence[int | str]) -> tuple[str, ...]:
    """The class names where there is no head to give any: the task's, else what the labels themselves say."""
    if task_names:
        return tuple(task_names)
    integers = [label for label in labels if isinstance(label, int)]
    if len(integers) == len(labels):
        return tuple(f"LABEL_{index}" for index in range(max(integers) + 1))
    return tuple(sorted({str(label) for label in labels}))


def ids_of(labels: Sequence[int] | Sequence[str], names: Sequence[str], source: str) -> list[int]:
    """Labels of the data as indices into `names`. Raises InputError for one that is not there."""
    index = {_folded(name): number for number, name in enumerate(names)}
    ids = [label if isinstance(label, int) else index.get(_folded(label), -1) for label in labels]
    for label, number in zip(labels, ids, strict=True):
        if not 0 <= number < len(names):
            raise InputError(
                f"wrong task for the head: {source} has the label {label!r}, the classes are {', '.join(names)}"
            )
    return ids


def head_order(head: Sequence[str], names: Sequence[str], model: str) -> list[int]:
    """For each output of a head, the index into `names` of the class it stands for.

    Raises InputError when the numbers of classes differ or the names cannot be matched one to one.
    """
    if len(head) != len(names):
        raise InputError(
            f"wrong task for the head: {model} has {_counted(head)} ({', '.join(head)}), "
            f"the task has {len(names)} ({', '.join(names)})"
        )
    numbers = counted(head)
    if numbers is not None and counted(names) is None:
        return numbers
    index = {_folded(name): number for number, name in enumerate(names)}
    order = [index.get(_folded(name), -1) for name in head]
    if sorted(order) != list(range(len(names))):
        raise InputError(
            f"wrong task for the head: the classes of {model} ({', '.join(head)}) cannot be matched by name with "
            f"{', '.join(names)}; correct id2label in its config.json"
        )
    return order


def _folded(name: str) -> str:
    number = _COUNTED.fullmatch(name.strip())
    return f"label_{int(number[1])}" if number else name.strip().casefold()


def _counted(head: Sequence[str]) -> str:
    return "a regression head" if len(head) == 1 else f"{len(head)} classes"
