import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig

from qtool.errors import InputError
from qtool.evaluation.labels import counted, data_names, head_names, head_order, ids_of, reference_names

SST2 = ("negative", "positive")


def test_head_names_are_in_the_order_of_outputs() -> None:
    assert head_names(BertConfig(id2label={"10": "k", "2": "c", **{str(i): str(i) for i in (0, 1)}})) == (
        "0",
        "1",
        "c",
        "k",
    )
    assert head_names(BertConfig(num_labels=3)) == ("LABEL_0", "LABEL_1", "LABEL_2")


@pytest.mark.parametrize(
    ("head", "order"),
    [
        (("negative", "positive"), [0, 1]),
        (("POSITIVE", " Negative"), [1, 0]),
        (("LABEL_0", "LABEL_1"), [0, 1]),
        (("LABEL_1", "LABEL_0"), [1, 0]),
        (("0", "1"), [0, 1]),
    ],
)
def test_heads_are_matched_by_name(head: tuple[str, ...], order: list[int]) -> None:
    assert head_order(head, SST2, "m") == order


@given(st.permutations(["anger", "joy", "LABEL_7", "sadness", "4"]))
def test_any_order_of_names_is_undone(head: list[str]) -> None:
    names = ("Anger", "4", "Joy", "label_7", "SADNESS")
    order = head_order(head, names, "m")
    assert [names[index].casefold() for index in order] == [name.casefold() for name in head]


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (("a", "b", "c"), ["3 classes (a, b, c)", "2 (negative, positive)"]),
        (("score",), ["regression head"]),
        (("pos", "neg"), ["matched by name", "id2label"]),
        (("negative", "negative"), ["matched by name"]),
        (("LABEL_0", "LABEL_2"), ["matched by name"]),
    ],
)
def test_heads_that_do_not_fit(head: tuple[str, ...], words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        head_order(head, SST2, "some-model")
    assert all(word in str(error.value) for word in ["wrong task for the head", "some-model", *words])


def test_whose_names_count() -> None:
    generic, telling = ("LABEL_0", "LABEL_1"), ("no", "yes")
    assert reference_names(SST2, [generic]) == SST2
    assert reference_names(None, [generic, telling]) == telling
    assert reference_names(None, [("LABEL_1", "LABEL_0")]) == generic


def test_names_from_labels_alone() -> None:
    assert data_names(SST2, [0, 1]) == SST2
    assert data_names(None, [0, 2, 0]) == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert data_names(None, ["b", "a", "b"]) == ("a", "b")


def test_ids() -> None:
    assert ids_of([1, 0], SST2, "d") == [1, 0]
    assert ids_of(["Positive", " negative"], SST2, "d") == [1, 0]
    assert ids_of(["LABEL_1"], ("LABEL_0", "LABEL_1"), "d") == [1]
    for wrong in ([2], ["neutral"]):
        with pytest.raises(InputError, match=r"wrong task for the head.*negative, positive"):
            ids_of(wrong, SST2, "d")  # type: ignore[arg-type]


def test_counted() -> None:
    assert counted(["LABEL_1", "label 0"]) == [1, 0]
    assert counted(["1 star", "2 stars"]) is None
    assert counted(["1", "2"]) is None
