"""The native backend: the reference's integers from compiled kernels.

Small and rare operations are the reference's own.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from qtool.kernels import attention, native, reference, structs
from qtool.kernels.codebook import WholeCodebook
from qtool.kernels.reference import Reference, Rescale
from qtool.kernels.structs import address
from qtool.numerics.qtensor import TILE_COLUMNS, tile


@dataclass
class Operand:
    """A weight as the kernels read it: int8 tiles (uint8 of two codes each), and int32 sums `[column blocks, out]`.

    Scales are shared by `width` inputs of a row.
    """

    tiles: torch.Tensor
    row_sums: torch.Tensor
    shape: tuple[int, int]
    width: int
    _spread: dict[str, tuple[torch.Tensor, int | None, torch.Tensor]] = field(default_factory=dict)
    _structs: "_Structs" = field(default_factory=lambda: _Structs())

    def spread(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Numbers of blocks `[row blocks, column blocks]` as `[column blocks, out]`; the last of a name are kept."""
        version = None if values.is_inference() else values._version
        known = self._spread.get(name)
        if known is None or known[0] is not values or known[1] != version or version is None:
            wide = values.repeat_interleave(self.shape[0] // len(values), dim=0)
            known = self._spread[name] = values, version, wide.t().contiguous()
        return known[2]

    @classmethod
    def of(cls, codes: torch.Tensor, shape: tuple[int, int], width: int) -> "Operand":
        """From stored codes in either layout; tiles are taken as they are."""
        tiles = codes if codes.dim() == 4 and codes.is_contiguous() else tile(reference.whole_codes(codes, shape))
        sums = torch.empty((max(1, -(-shape[1] // width)), shape[0]), dtype=torch.int32)
        nibbles = tiles.dtype == torch.uint8
        native.call("qtool_row_sums", address(tiles), nibbles, *shape, width, address(sums))
        return cls(tiles, sums, shape, width)

    def struct(self, *given: torch.Tensor | None) -> structs.QLinear:
        """What the kernel is given; the tensors are those of `q_linear` in its order."""
        made: structs.QLinear = self._structs.get((self.tiles, *given), lambda: self._make(*given))
        return made

    def _make(self, scale: Any, bias: Any, act_scale: Any, offset: Any) -> structs.QLinear:
        kept: list[torch.Tensor] = []
        made = q_linear(self, scale, bias, act_scale, kept, offset)
        made.kept = kept
        return made

    def correction(self, unsigned: bool) -> torch.Tensor | None:
        """What is added to the sums of every output for codes that are stored larger than they are."""
        factor = (reference.QMAX if unsigned else 0) - native.code_offset()
        return self.row_sums[0] * factor if factor else None


Given = tuple[torch.Tensor | None, ...]


class _Structs:
    """The struct made last of an operand's tensors, as long as these are the same, unchanged and where they were.

    A step of generation calls each layer for one row: making structs would take longer than many products.
    """

    _last: tuple[Given, tuple[int, ...], Any] | None = None

    def get(self, given: Given, make: Callable[[], Any]) -> Any:
        """That of `given`, made anew by `make` when one changed."""
        if any(tensor is not None and tensor.is_inference() for tensor in given):  # these do not count their changes
            return make()
        state = tuple(part for t in given if t is not None for part in (t._version, t.data_ptr()))
        last = self._last
        if last is None or last[1] != state or any(a is not b for a, b in zip(last[0], given, strict=True)):
            last = self._last = given, state, make()
        return last[2]


@dataclass
class NativeCodes(reference.Codes):
    """Tiled codes, int8 or uint8 of two a byte, and the struct that goes with them."""

    _structs: _Structs = field(default_factory=_Structs)

    def struct(self, scale: torch.Tensor, offset: torch.Tensor | None, bias: torch.Tensor | None) -> structs.CodeLinear:
        """What the kernel is given."""
        given = self.codes, scale, offset, bias
        made: structs.CodeLinear = self._structs.get(given, lambda: self._make(scale, offset, bias))
        return made

    def _make(self, *tensors: torch.Tensor | None) -> structs.CodeLinear:
        whole = [None if tensor is None else tensor.detach().contiguous() for tensor in tensors]
        (outputs, inputs), (row_blocks, column_blocks) = self.shape, whole[0].shape  # type: ignore[union-attr]
        layout = structs.CodeLinear.NIBBLES if self.codes.dtype == torch.uint8 else structs.CodeLinear.TILES
        made = structs.CodeLinear(
            address(self.codes), *(address(tensor) for tensor in whole),
            inputs, outputs, outputs // row_blocks, column_blocks, self.width, layout,
        )  # fmt: skip
        made.kept = whole  # the tensors that it points to
        return made


_ALONE = 1 << 20  # multiply-adds, or as long on rows, that are done before another thread is awake


_WAIT = 8  # times as much has to be worth a wait in the middle, which on a busy machine is one for the scheduler


def threads(work: int, waits: int = 0) -> int:
    """As many as torch uses; one for what is too little to share, with `waits` for each other before the end."""
    return torch.get_num_threads() if work > _ALONE * (1 + _WAIT * waits) else 1


_FEW_ROWS = 4  # of activations for which a table is read code by code


class Native(Reference):
    """Compiled kernels for the CPU's instruction set."""

    name = "native"

    def prepare(self, codes: torch.Tensor, shape: tuple[int, int], width: int | None = None) -> Any:
        """The stored tiles with the sums of their rows; the reference's operand for blocks that cut through tiles."""
        width = width or shape[1]
        return Operand.of(codes, shape, width) if whole_tiles(shape[1], width) else super().prepare(codes, shape, width)

    def row_sums(self, operand: Any) -> torch.Tensor:
        """int32 `[out]`."""
        sums: torch.Tensor = operand.row_sums.sum(0, dtype=torch.int32)
        return sums

    def int8_linear(
        self,
        x: torch.Tensor,
        operand: Any,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
        act_scale: torch.Tensor | None,
        weight_offset: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Reference.int8_linear`; the same bits."""
        if not isinstance(operand, Operand):
            return super().int8_linear(x, operand, weight_scale, bias, act_scale, weight_offset)
        x = x.contiguous()
        struct = operand.struct(weight_scale, bias, act_scale, weight_offset)
        result = torch.empty((len(x), operand.shape[0]), dtype=torch.float32)
        native.call(
            "qtool_float_linear",
            ctypes.byref(struct),
            address(x),
            len(x),
            address(result),
            threads(x.numel() * operand.shape[0]),
        )
        return result

    def prepare_codes(self, codes: torch.Tensor, shape: tuple[int, int], width: int) -> Any:
        """Tiled codes as they are; the reference's for blocks that cut through tiles."""
        cuts = width % TILE_COLUMNS and width < shape[1]
        return super().prepare_codes(codes, shape, width) if cuts else NativeCodes(codes.contiguous(), shape, width)

    def code_linear(
        self,
        x: torch.Tensor,
        operand: Any,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
        weight_offset: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Reference.code_linear`; the reference's own for blocks that cut through tiles."""
        if not isinstance(operand, NativeCodes):
            return super().code_linear(x, operand, weight_scale, bias, weight_offset)
        return _code_linear(x, operand.struct(weight_scale, weight_offset, bias), operand.shape[0])

    def row_table_linear(
        self, x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """See `Reference.row_table_linear`; torch's product of unpacked rows is better for many tokens."""
        if len(x) > _FEW_ROWS or codes.dtype != torch.int8 or not codes.is_contiguous():
            return super().row_table_linear(x, codes, scale, bias)
        rows, columns = codes.shape
        scale = scale.contiguous()
        struct = structs.CodeLinear(
            address(codes), address(scale), None, address(bias),
            columns, rows, rows // len(scale), 1, columns, structs.CodeLinear.ROWS,
        )  # fmt: skip
        return _code_linear(x, struct, rows)

    @staticmethod
    def float_encoder(encoder: structs.QEncoder, hidden: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        """All blocks of an encoder: float32 `[batch, tokens, hidden]` → the same, 0 where `real` is not."""
        batch, tokens, width = hidden.shape
        hidden = hidden.detach()  # integer codes have no gradient
        if real is None or bool(real.all()):
            where, starts = None, torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32)
            rows = hidden.reshape(-1, width).clone()
        else:
            starts = torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).int()
            where = real.flatten().nonzero().squeeze(1)
            rows = hidden.reshape(-1, width).index_select(0, where)
        if len(rows):
            native.call(
                "qtool_float_encoder",
                ctypes.byref(encoder),
                address(rows),
                address(starts),
                batch,
                threads(width * width * len(rows)),
            )
        if where is not None:
            rows = torch.zeros((batch * tokens, width)).index_copy_(0, where, rows)
        return rows.view(batch, tokens, width)

    @staticmethod
    def decoder_front(
        front: structs.DecoderFront, work: int, hidden: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
    ) -> torch.Tensor:
        """A decoder block up to its attention: float32 `[..., hidden]` → `[..., heads + 2 groups, size]`.

        These are queries and keys, turned, and values. Row r is turned by angle r modulo their number; angles are
        `[..., size]`. `work` is how many multiply-adds a row takes.
        """
        hidden, cosine, sine = hidden.detach().contiguous(), cosine.contiguous(), sine.contiguous()
        rows = hidden.numel() // front.norm.size
        rotation = structs.Rotation(cosine.data_ptr(), sine.data_ptr(), cosine.numel() // front.size)
        result = torch.empty((*hidden.shape[:-1], front.heads + 2 * front.groups, front.size), dtype=torch.float32)
        if rows:
            native.call(
                "qtool_decoder_front", ctypes.byref(front), ctypes.byref(rotation), hidden.data_ptr(), rows,
                result.data_ptr(), threads(work * rows, 1),
            )  # fmt: skip
        return result

    @staticmethod
    def decoder_back(back: structs.DecoderBack, work: int, context: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The rest of a decoder block: the context of all heads, and what went into the block, `[..., hidden]`.

        Returns what leaves the block. `work` is how many multiply-adds a row takes.
        """
        context, hidden = context.detach().float().contiguous(), hidden.detach().contiguous()
        rows, result = hidden.numel() // back.norm.size, torch.empty_like(hidden)
        if rows:
            native.call(
                "qtool_decoder_back", ctypes.byref(back), context.data_ptr(), hidden.data_ptr(), rows,
                result.data_ptr(), threads(work * rows, 2),
            )  # fmt: skip
        return result

    @staticmethod
    def wide_attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
    ) -> torch.Tensor:
        """See `Reference.wide_attention`."""
        batch, heads, _, size = query.shape
        groups, keys = key.shape[1:3]
        seen = None if mask is None else mask.expand(batch, -1, 1, keys)
        strides = (0, 0) if seen is None else (seen.stride(0), seen.stride(1) if seen.shape[1] > 1 else 0)
        struct = structs.WideAttention(
            query.data_ptr(), key.data_ptr(), value.data_ptr(), None if seen is None else seen.data_ptr(),
            *query.stride()[:2], *key.stride()[:3], *value.stride()[:3], *strides,
            scaling, batch, heads, groups, keys, size,
        )  # fmt: skip
        result = torch.empty((batch, 1, heads, size), dtype=torch.float32)
        native.call("qtool_wide_attention", ctypes.byref(struct), result.data_ptr(), threads(query.numel() * keys))
        return result

    @staticmethod
    def int8_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        value_scale: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        scaling: float,
        softcap: float | None = None,
        book: WholeCodebook | None = None,
        level_unit: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `attention.int8_attention`; the same bits. Soft caps and masks that are added are the reference's."""
        if softcap is not None or (mask is not None and mask.dtype != torch.bool):
            options: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "book": book, "level_unit": level_unit}
            return Reference.int8_attention(query, key, value, value_scale, mask, **options)
        attention.check_codebook(book, level_unit, key.shape[2])
        codes, unit, k_unit = attention.quantized(query, key, value, value_scale, scaling)
        kept = [tensor.contiguous() for tensor in (*codes, unit, k_unit, value_scale)]
        (batch, heads, queries, size), (groups, keys) = query.shape, key.shape[1:3]
        seen = None if mask is None else mask.expand(batch, heads, queries, keys)
        seen = seen.contiguous() if seen is not None and seen.stride(3) != 1 else seen
        where = None if seen is None else seen.data_ptr()
        steps = (0, 0, 0) if seen is None else seen.stride()[:3]
        struct = structs.Int8Attention(
            *(address(tensor) for tensor in kept), where, *steps, batch, heads, groups, queries, keys, size,
            codebook(book), address(level_unit),
        )  # fmt: skip
        context = torch.empty((batch, heads, queries, size), dtype=torch.float32)
        found = torch.empty((batch, heads, queries, keys), dtype=torch.uint8)
        native.call(
            "qtool_int8_attention", ctypes.byref(struct), address(context), address(found),
            threads(2 * query.numel() * keys),
        )  # fmt: skip
        return context.transpose(1, 2), found

    @staticmethod
    def quantize_rows(x: torch.Tensor, *, unsigned: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """See `reference.quantize_rows`."""
        x = x.contiguous()
        width = x.shape[-1]
        rows = x.numel() // max(width, 1)
        codes = torch.empty(x.shape, dtype=torch.int8)
        amax = torch.empty((*x.shape[:-1], 1), dtype=torch.int64)
        native.call(
            "qtool_quantize_rows",
            address(x),
            rows,
            width,
            unsigned,
            address(codes),
            address(amax),
            threads(8 * x.numel()),
        )
        return codes, amax

    @staticmethod
    def integer_linear(
        codes: torch.Tensor,
        amax: torch.Tensor | None,
        weight: Any,
        row_sums: torch.Tensor | None,
        align: torch.Tensor,
        bias: torch.Tensor,
        to_output: Rescale,
        bits: int,
    ) -> torch.Tensor:
        """See `reference.integer_linear`."""
        codes = codes.contiguous()
        amax = None if amax is None else amax.contiguous()
        outputs, inputs = weight.shape
        correction = weight.correction(row_sums is not None)
        struct = structs.IntLinear(
            weight=address(weight.tiles), correction=address(correction), bias=address(bias),
            multiplier=address(to_output[0]), shift=address(to_output[1]), inputs=inputs, outputs=outputs,
            out_bits=bits, align=int(align), dynamic=amax is not None, is_unsigned=row_sums is not None,
        )  # fmt: skip
        result = torch.empty((*codes.shape[:-1], outputs), dtype=torch.int32)
        rows = codes.numel() // inputs
        native.call(
            "qtool_integer_linear", ctypes.byref(struct), address(codes), address(amax), rows, address(result),
            threads(rows * inputs * outputs),
        )  # fmt: skip
        return result

    @staticmethod
    def integer_norm(
        x: torch.Tensor, eps: torch.Tensor, to_output: Rescale, bias: torch.Tensor, bits: int
    ) -> torch.Tensor:
        """See `reference.integer_norm`."""
        x = x.contiguous()
        result = torch.empty_like(x)
        struct = structs.IntNorm(
            address(to_output[0]), address(to_output[1]), address(bias), int(eps), x.shape[-1], bits
        )
        rows = x.numel() // x.shape[-1]
        native.call(
            "qtool_integer_norm", ctypes.byref(struct), address(x), rows, address(result), threads(8 * x.numel())
        )
        return result

    @staticmethod
    def integer_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        real: torch.Tensor,
        align: torch.Tensor,
        to_scores: Rescale,
        to_context: Rescale,
        *,
        grid: int,
        bits: int,
        context_bits: int,
        book: WholeCodebook | None = None,
    ) -> torch.Tensor:
        """See `reference.integer_attention`."""
        batch, tokens, heads, size = query.shape
        exp_b, exp_c = reference.exp_constants(grid)
        struct = structs.IntAttention(
            *(address(tensor) for tensor in (*to_scores, *to_context)),
            heads, size, int(align), grid, bits, context_bits, exp_b, exp_c, codebook(book),
        )  # fmt: skip
        query, key, value = query.contiguous(), key.to(torch.int8).contiguous(), value.to(torch.int8).contiguous()
        keys, starts = kept(real)
        result = torch.empty((batch, tokens, heads * size), dtype=torch.int32)
        native.call(
            "qtool_integer_attention", ctypes.byref(struct), address(query), address(key), address(value),
            address(keys), address(starts), batch, tokens, address(result), threads(tokens * query.numel()),
        )  # fmt: skip
        return result

    @staticmethod
    def integer_encoder(
        encoder: structs.IntEncoder, ids: list[torch.Tensor | None], real: torch.Tensor, width: int
    ) -> torch.Tensor:
        """All blocks of an encoder: integer `ids` for each table `[batch, tokens]` → int32 `[batch, tokens, width]`.

        `real` is boolean `[batch, tokens]`. What is not real is never computed, and 0. Raises IndexError for an id
        that a table does not have.
        """
        starts = torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).int()
        whole = int(starts[-1]) == real.numel()
        where = None if whole else real.flatten().nonzero().squeeze(1)
        gathered = [None if x is None else x.flatten() if where is None else x.flatten()[where] for x in ids]
        gathered = [None if x is None else x.long().contiguous() for x in gathered]
        rows = torch.empty((int(starts[-1]), width), dtype=torch.int32)
        batch = structs.IntBatch(
            (ctypes.c_void_p * 3)(*(address(x) for x in gathered)), address(starts), len(real), len(rows)
        )
        if len(rows):
            native.call(
                "qtool_integer_encoder",
                ctypes.byref(encoder),
                ctypes.byref(batch),
                address(rows),
                threads(width * width * len(rows)),
            )
        if where is not None:
            rows = torch.zeros((real.numel(), width), dtype=torch.int32).index_copy_(0, where, rows)
        return rows.view(*real.shape, width)


def codebook(book: WholeCodebook | None) -> structs.WholeCodebook:
    """What the kernels read; the tensors of `book` are contiguous and must outlive it."""
    if book is None:
        return structs.WholeCodebook()
    count = book.edges.shape[1]
    return structs.WholeCodebook(address(book.edges), address(book.levels), count, book.relative, book.renormalize)


def whole_tiles(inputs: int, width: int) -> bool:
    """Whether blocks of `width` inputs that share scales are made of whole tiles, as the kernels need it."""
    return width >= inputs or width % TILE_COLUMNS == 0


def _code_linear(x: torch.Tensor, struct: structs.CodeLinear, outputs: int) -> torch.Tensor:
    x = x.detach().contiguous()
    result = torch.empty((len(x), outputs), dtype=torch.float32)
    shared = threads(x.numel() * outputs)
    native.call("qtool_code_linear", ctypes.byref(struct), address(x), len(x), address(result), shared)
    return result


def q_linear(
    operand: Operand,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    act_scale: torch.Tensor | None,
    kept: list[torch.Tensor],
    weight_offset: torch.Tensor | None = None,
) -> structs.QLinear:
    """The struct of a linear layer; tensors made for it are appended to `kept`, which must outlive it."""
    outputs, inputs = operand.shape
    offset = None if weight_offset is None else operand.spread("offset", weight_offset)
    tensors = (operand.tiles, operand.row_sums, operand.spread("scale", weight_scale), bias, act_scale, offset)
    kept += [tensor for tensor in tensors if tensor is not None]
    return structs.QLinear(
        *(address(tensor) for tensor in tensors), inputs, outputs,
        weight_scale.shape[1], operand.width, operand.tiles.dtype == torch.uint8,
    )  # fmt: skip


def kept(real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the true columns of `real` `[rows, columns]`, row by row, and where each row's start; int32."""
    starts = torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0))
    return real.nonzero()[:, 1].int().contiguous(), starts.int()
