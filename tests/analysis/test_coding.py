"""Tables of codes against the codebook that they are made of."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.analysis.coding import Coding
from qtool.errors import InputError
from qtool.numerics.codebook import Codebook

MAKERS = {
    "log": Codebook.log,
    "linear": Codebook.linear,
    "log, not pruned": lambda bits, threshold: Codebook.log_unpruned(bits),
    "linear, not pruned": lambda bits, threshold: Codebook.linear_unpruned(bits),
}


@given(
    st.sampled_from(sorted(MAKERS)),
    st.integers(2, 8),
    st.sampled_from([1e-4, 1e-3, 0.0123, 0.1, 0.5]),
    st.lists(st.floats(0, 1.0000001192092896, width=32), max_size=20),
)
def test_levels_are_the_codebooks(form: str, bits: int, threshold: float, values: list[float]) -> None:
    book = MAKERS[form](bits, threshold)
    near = book.edges.float()
    around = [near, near.nextafter(torch.tensor(0.0)), near.nextafter(torch.tensor(2.0)), torch.tensor([0.0, 1.0])]
    numbers = torch.cat([torch.tensor(values, dtype=torch.float32), *around])
    assert torch.equal(Coding(book)(numbers), book.values(book.codes(numbers)).float())


def test_what_tables_cannot_do() -> None:
    close = torch.tensor([0.5, 0.5 + 2**-23, 0.5 + 2**-22], dtype=torch.float64)
    with pytest.raises(InputError, match="closer"):
        Coding(Codebook(close, torch.tensor([0.0, 0.1, 0.2, 0.3], dtype=torch.float64)))
    book = Codebook.log(2)
    with pytest.raises(InputError, match="all heads share"):
        Coding(Codebook(book.edges.expand(2, -1), book.levels.expand(2, -1)))
