"""The structs of csrc/integer.h and csrc/float.h, field by field; what the fields mean is said there."""

import ctypes

import torch

_P = ctypes.c_void_p
_I32, _I64 = ctypes.c_int32, ctypes.c_int64


class IntLinear(ctypes.Structure):
    """A linear layer on integers."""

    _fields_ = (
        *[(name, _P) for name in ("weight", "correction", "bias", "multiplier", "shift")],
        *[(name, _P) for name in ("in_multiplier", "in_shift", "in_offset")],
        *[(name, _I32) for name in ("inputs", "outputs", "in_bits", "out_bits", "align", "dynamic", "is_unsigned")],
    )


class IntNorm(ctypes.Structure):
    """i-LayerNorm."""

    _fields_ = (("weight", _P), ("shift", _P), ("bias", _P), ("eps", _I64), ("size", _I32), ("out_bits", _I32))


class IntActivation(ctypes.Structure):
    """A table, the polynomial GELU or ReLU, by `kind`."""

    TABLE, POLYNOMIAL, RELU = 0, 1, 2
    _fields_ = (
        ("table", _P),
        ("constants", _I64 * 4),
        *[(name, _I32) for name in ("kind", "in_bits", "multiplier", "shift", "shifted")],
    )


class WholeCodebook(ctypes.Structure):
    """Codebooks of all heads; `count` edges of each, none for probabilities that are no codes."""

    _fields_ = (("edges", _P), ("levels", _P), *[(name, _I32) for name in ("count", "relative", "renormalize")])


class IntAttention(ctypes.Structure):
    """Attention of all heads."""

    _fields_ = (
        *[(name, _P) for name in ("score_multiplier", "score_shift", "multiplier", "shift")],
        *[(name, _I32) for name in ("heads", "size", "align", "grid", "bits", "out_bits", "exp_b", "exp_c")],
        ("book", WholeCodebook),
    )


class IntBlock(ctypes.Structure):
    """A transformer block."""

    _fields_ = (
        *[(role, IntLinear) for role in ("query", "key", "value")],
        ("attention", IntAttention),
        ("output", IntLinear),
        ("attention_norm", IntNorm),
        ("up", IntLinear),
        ("act", IntActivation),
        ("down", IntLinear),
        ("ffn_norm", IntNorm),
    )


class IntRows(ctypes.Structure):
    """An embedding table."""

    _fields_ = (("weight", _P), ("multiplier", _P), ("shift", _P), ("rows", _I32), ("bits", _I32))


class IntEncoder(ctypes.Structure):
    """Embeddings and all blocks."""

    _fields_ = (
        ("tables", IntRows * 3),
        ("norm", IntNorm),
        ("projection", IntLinear),
        ("blocks", ctypes.POINTER(IntBlock)),
        ("count", _I32),
        ("hidden", _I32),
    )


class IntBatch(ctypes.Structure):
    """Sequences without their padding."""

    _fields_ = (("ids", _P * 3), ("starts", _P), ("sequences", _I32), ("tokens", _I32))


class QLinear(ctypes.Structure):
    """A linear layer of float rows and integer weights."""

    _fields_ = (
        *[(name, _P) for name in ("weight", "row_sums", "scale", "bias", "act_scale", "offset")],
        *[(name, _I32) for name in ("inputs", "outputs", "column_blocks", "width", "nibbles")],
    )


class CodeLinear(ctypes.Structure):
    """A linear layer of float rows and integer weights that stays in float."""

    TILES, NIBBLES, ROWS = 0, 1, 2
    _fields_ = (
        *[(name, _P) for name in ("weight", "scale", "offset", "bias")],
        *[(name, _I32) for name in ("inputs", "outputs", "block_rows", "column_blocks", "width", "layout")],
    )


class Norm(ctypes.Structure):
    """LayerNorm."""

    _fields_ = (("weight", _P), ("bias", _P), ("eps", ctypes.c_float), ("size", _I32))


class QBlock(ctypes.Structure):
    """A transformer block."""

    _fields_ = (
        *[(role, QLinear) for role in ("query", "key", "value", "output")],
        ("attention_norm", Norm),
        *[(role, QLinear) for role in ("up", "down")],
        ("ffn_norm", Norm),
    )


class QEncoder(ctypes.Structure):
    """All blocks."""

    GELU, RELU = 0, 1
    _fields_ = (
        ("blocks", ctypes.POINTER(QBlock)),
        *[(name, _I32) for name in ("count", "hidden", "size", "activation")],
    )


class RmsNorm(ctypes.Structure):
    """RMSNorm."""

    _fields_ = (("weight", _P), ("eps", ctypes.c_float), ("size", _I32))


class DecoderLinear(ctypes.Structure):
    """A linear layer of a decoder, of either kind."""

    _fields_ = (("quantized", QLinear), ("codes", CodeLinear), ("is_float", _I32))


class DecoderFront(ctypes.Structure):
    """A pre-norm block up to its attention."""

    _fields_ = (
        *[(role, DecoderLinear) for role in ("query", "key", "value")],
        ("norm", RmsNorm),
        *[(name, _I32) for name in ("heads", "groups", "size")],
    )


class Rotation(ctypes.Structure):
    """Cosines and sines by which queries and keys are turned."""

    _fields_ = (("cosine", _P), ("sine", _P), ("count", _I32))


class DecoderBack(ctypes.Structure):
    """A pre-norm block behind its attention, with a gated feed-forward part."""

    SILU, GELU = 0, 1
    _fields_ = (
        *[(role, DecoderLinear) for role in ("output", "gate", "up", "down")],
        ("norm", RmsNorm),
        ("activation", _I32),
    )


class Int8Attention(ctypes.Structure):
    """Codes of queries, keys and values, what they are worth, who may look where, and codebooks of weights."""

    _fields_ = (
        *[(name, _P) for name in ("query", "key", "value", "unit", "key_unit", "value_scale", "mask")],
        *[(name, ctypes.c_int64) for name in ("mask_batch", "mask_head", "mask_query")],
        *[(name, _I32) for name in ("batch", "heads", "groups", "queries", "keys", "size")],
        ("book", WholeCodebook),
        ("level_unit", _P),
    )


class WideAttention(ctypes.Structure):
    """One query a head, keys and values where a cache has them."""

    _fields_ = (
        *[(name, _P) for name in ("query", "key", "value", "mask")],
        *[(name, _I64) for name in ("query_batch", "query_head", "key_batch", "key_head", "key_token")],
        *[(name, _I64) for name in ("value_batch", "value_head", "value_token", "mask_batch", "mask_head")],
        ("scaling", ctypes.c_double),
        *[(name, _I32) for name in ("batch", "heads", "groups", "keys", "size")],
    )


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's numbers start; it must be contiguous, in the CPU's memory, and outlive the call."""
    if tensor is None:
        return None
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    return tensor.data_ptr()
