"""The module of int8 attention in codes: what it holds, what its codes stand for, what it is made from."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from qtool.errors import InputError
from qtool.kernels.attention import int8_attention
from qtool.kernels.codebook import WholeCodebook
from qtool.nn import MODULES, QAttention, QCodedAttention
from qtool.numerics.codebook import Codebook

BOOK = Codebook.log(3, 1e-3)


def filled(codebook: Codebook = BOOK, **words: Any) -> QCodedAttention:
    words = {"code_bits": 3, "relative": True, "renormalize": True, "tokens": 64, **words}
    module = QCodedAttention(4, 2, 8, **words)
    module.value_scale = torch.tensor([0.02, 0.03])
    module.fill(codebook)
    return module


def inputs(keys: int = 12) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, keys, 8), (2, 2, keys, 8), (2, 2, keys, 8)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


@pytest.mark.parametrize("bits", [None, 3])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
def test_it_hands_its_codebook_to_the_operation(bits: int | None, relative: bool, renormalize: bool) -> None:
    module = filled(code_bits=bits, relative=relative, renormalize=renormalize, **{} if bits else {"codebook": ONE})
    names = {
        "value_scale",
        "edges",
        *(["levels"] if bits else []),
        *(["level_unit"] if bits and not renormalize else []),
    }
    assert set(module.state_dict()) == names
    context, codes = module(*inputs(), None)
    book = WholeCodebook(module.edges, module.levels, relative, renormalize)
    wanted = int8_attention(
        *inputs(), module.value_scale, None, scaling=8**-0.5, book=book, level_unit=module.level_unit
    )
    assert torch.equal(context, wanted[0]) and torch.equal(codes, wanted[1]) and module.calls == 1


ONE = Codebook(torch.tensor([1e-2], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_levels_times_their_unit_are_those_of_the_codebook() -> None:
    module = filled(renormalize=False)
    assert module.levels is not None and module.level_unit is not None
    standing = module.levels * module.level_unit[:, None]
    torch.testing.assert_close(standing.double(), BOOK.levels.expand(4, -1), rtol=2e-3, atol=0)
    assert (module.edges == (BOOK.edges * 2**24).ceil()).all()


def test_levels_leave_room_for_the_longest_text() -> None:
    for tokens in (64, 1032, 1033, 8192, 65536, 1 << 20):
        module = filled(tokens=tokens)
        assert module.levels is not None
        largest = int(module.levels.max())
        assert 127 * largest * min(tokens, 65536) < 2**31
        assert largest == min(16383, (2**31 - 1) // (127 * min(tokens, 65536)))
    few = filled(tokens=20)
    few.levels = torch.full((4, 8), 16383, dtype=torch.int32)
    with pytest.raises(InputError, match="adds up 1040 levels of up to 16383; int32 has room for 1032"):
        few(*inputs(1040), None)


def test_values_are_the_levels_of_a_row_divided_by_their_sum() -> None:
    codebook = Codebook(BOOK.edges.expand(4, -1), BOOK.levels * torch.arange(1, 5).double()[:, None])
    module = filled(codebook, renormalize=False)
    assert module.levels is not None
    codes = torch.randint(0, 8, (2, 4, 3, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    codes[0, 0, 0] = 0
    found = module.values(codes)
    for b in range(2):
        for h in range(4):
            for row, line in zip(codes[b, h].tolist(), found[b, h].tolist(), strict=True):
                levels = [int(module.levels[h, code]) for code in row]
                assert line == pytest.approx([level / max(1, sum(levels)) for level in levels], rel=1e-6)
    pruned = filled(ONE, code_bits=None)
    assert torch.equal(pruned.values(codes), QAttention(4, 2, 8).values(codes))


@pytest.mark.parametrize("bits", [None, 3])
def test_descriptions_rebuild_the_module(bits: int | None) -> None:
    module = filled(BOOK if bits else ONE, code_bits=bits, renormalize=False)
    description = json.loads(json.dumps(module.description()))
    assert description == {
        "type": "coded_attention", "heads": 4, "groups": 2, "size": 8, "activations": "int8:token:sym",
        "code_bits": bits, "relative": True, "renormalize": False, "tokens": 64,
    }  # fmt: skip
    other = MODULES["coded_attention"].from_description(nn.Module(), "a.b", description, device="cpu")
    assert type(other) is QCodedAttention and other.description() == description
    other.load_state_dict(module.state_dict(), assign=True)
    assert all(torch.equal(*pair) for pair in zip(other(*inputs(), None), module(*inputs(), None), strict=True))
    with pytest.raises(InputError, match=r"a\.b: activations float cannot run"):
        QCodedAttention.from_description(nn.Module(), "a.b", {**description, "activations": "float"}, device="cpu")
    with pytest.raises(InputError, match="2 to 8 bits, not 9"):
        QCodedAttention.from_description(nn.Module(), "a.b", {**description, "code_bits": 9}, device="cpu")


def test_casts_leave_codebook_and_scales() -> None:
    module = filled(renormalize=False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    wanted, _ = module(*inputs(), None)
    found, _ = module.half()(*inputs(), None)
    assert found.dtype == torch.float16 and torch.equal(found, wanted.half())
    for name, value in module.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name
