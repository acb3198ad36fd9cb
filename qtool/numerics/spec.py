"""`QuantSpec`: how one matrix is rounded to integers, written as words of compressed-tensors or as `int4:group:64:sym`.

Every granularity is a block of `rows x columns` that shares one scale, so the rest of qtool knows blocks only:

    tensor          (None, None)   one scale
    channel, token  (1, None)      one a row: static for weights, dynamic for activations
    group           (1, g)         g neighbouring inputs of one row; the last group is shorter where g does not divide
    rows            (r, None)      r whole rows: the "groups" of the ZeroQuant paper (Yao et al. 2022)
    block           (r, c)         the general case
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qtool.errors import InputError, one_of

Storage = Literal["nibble", "int8", "int16", "int32"]

STRATEGIES = ("tensor", "channel", "token", "group", "rows", "block")
WORDS = ("num_bits", "type", "symmetric", "minimum", "dynamic", "strategy", "group_size", "block_structure")

_SIZE_WORD = {"group": "group_size", "rows": "group_size", "block": "block_structure"}
_EXTENT = r"([0-9]{1,9}|\*)x([0-9]{1,9}|\*)"
_SPELLING = re.compile(
    r"int(?P<bits>[0-9]{1,9}):(?:(?P<plain>tensor|channel|token)|(?P<sized>group|rows):(?P<size>[0-9]{1,9})"
    rf"|block:(?P<block>{_EXTENT}))(?::(?P<sign>sym|asym|min))?(?::(?P<when>static|dynamic))?"
)


@dataclass(frozen=True)
class QuantSpec:
    """Integers of `num_bits` (2-32), one scale for each `block` of (rows, columns); None is the full extent.

    `dynamic` scales are computed from each input at run time, static ones once. Symmetric codes are `-qmax..qmax`
    without a zero point (`-2^(b-1)` is never used, so that negation and `abs` cannot overflow). Asymmetric codes use
    all of `-2^(b-1)..2^(b-1)-1`: the usual `0..2^b-1` shifted by `2^(b-1)`, so that both live in one signed storage.
    Their zero point is an integer, or with `minimum` a float: value = code * scale + offset, as GGUF's Q4_1 stores it.
    Raises InputError for values out of range.
    """

    num_bits: int = 8
    symmetric: bool = True
    dynamic: bool = False
    block: tuple[int | None, int | None] = (None, None)
    minimum: bool = False

    def __post_init__(self) -> None:
        if not _is_int(self.num_bits) or not 2 <= self.num_bits <= 32:
            raise InputError(f"num_bits must be a whole number from 2 to 32, not {self.num_bits!r}")
        for word in ("symmetric", "minimum", "dynamic"):
            if not isinstance(getattr(self, word), bool):
                raise InputError(f"{word} must be true or false, not {getattr(self, word)!r}")
        if self.symmetric and self.minimum:
            raise InputError("a spec with minimum: true is not symmetric; leave out one of the two words")
        if not isinstance(self.block, tuple) or len(self.block) != 2:
            raise InputError(f"a block is a pair (rows, columns), not {self.block!r}")
        for extent in self.block:
            if extent is not None and (not _is_int(extent) or extent < 1):
                raise InputError(f"a block or group size must be a whole number of at least 1, not {extent!r}")

    @classmethod
    def parse(cls, value: "str | Mapping[str, Any] | QuantSpec") -> "QuantSpec":
        """Read a short spelling (`int8:channel:sym`), a mapping of compressed-tensors words, or pass a spec through.

        `token` means dynamic unless `static` is said; `group_size` alone means strategy `group`; absent words mean
        8 bits, symmetric, static, tensor. Raises InputError for anything unknown or inconsistent.
        """
        if isinstance(value, QuantSpec):
            return value
        if isinstance(value, str):
            return cls._from_words(_spelled(value))
        if isinstance(value, Mapping):
            return cls._from_words(value)
        raise InputError(f"cannot read {value!r} as a quantization spec; write for example int8:channel:sym")

    @classmethod
    def _from_words(cls, words: Mapping[str, Any]) -> "QuantSpec":
        for key in words:
            if key not in WORDS:
                raise InputError(one_of(str(key), WORDS, "quantization key"))
        given = {key: value for key, value in words.items() if value is not None}
        if given.get("type", "int") != "int":
            raise InputError(f"quantization type must be 'int', not {given['type']!r}; qtool stores integers only")
        implied = "group" if "group_size" in given else "block" if "block_structure" in given else "tensor"
        strategy = given.get("strategy", implied)
        if strategy not in STRATEGIES:
            raise InputError(one_of(str(strategy), STRATEGIES, "quantization strategy"))
        dynamic = given.get("dynamic", strategy == "token")
        minimum = given.get("minimum", False)
        symmetric = given.get("symmetric", minimum is False)
        return cls(given.get("num_bits", 8), symmetric, dynamic, _block(strategy, given), minimum)

    @property
    def strategy(self) -> str:
        """The compressed-tensors name of this granularity, one of `STRATEGIES`; a dynamic `channel` is `token`."""
        rows, columns = self.block
        if columns is None:
            return "tensor" if rows is None else "rows" if rows > 1 else "token" if self.dynamic else "channel"
        return "group" if rows == 1 else "block"

    def words(self) -> dict[str, Any]:
        """The spec in compressed-tensors words, clean for JSON; `QuantSpec.parse(spec.words()) == spec`."""
        words = {"num_bits": self.num_bits, "type": "int", "symmetric": self.symmetric, "dynamic": self.dynamic}
        words |= {"minimum": True} if self.minimum else {}
        sizes = {"group": self.block[1], "rows": self.block[0], "block": list(self.block)}
        strategy = self.strategy
        size = {_SIZE_WORD[strategy]: sizes[strategy]} if strategy in sizes else {}
        return {**words, "strategy": strategy, **size}

    def __str__(self) -> str:
        """The canonical short spelling; `QuantSpec.parse(str(spec)) == spec`."""
        rows, columns = self.block
        sizes = {"group": f":{columns}", "rows": f":{rows}", "block": f":{rows or '*'}x{columns}"}
        strategy = self.strategy
        sign = "sym" if self.symmetric else "min" if self.minimum else "asym"
        when = ":dynamic" if self.dynamic and strategy != "token" else ""
        return f"int{self.num_bits}:{strategy}{sizes.get(strategy, '')}:{sign}{when}"

    @property
    def qmax(self) -> int:
        """The largest code, `2^(num_bits-1) - 1`."""
        return (1 << (self.num_bits - 1)) - 1

    @property
    def qmin(self) -> int:
        """The smallest code: `-qmax` when symmetric, else `-qmax - 1`."""
        return -self.qmax if self.symmetric else -self.qmax - 1

    @property
    def storage(self) -> Storage:
        """What holds one code: half a byte up to 4 bits, then int8, int16, int32."""
        if self.num_bits <= 4:
            return "nibble"
        return "int8" if self.num_bits <= 8 else "int16" if self.num_bits <= 16 else "int32"

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Number of scales (row blocks, column blocks) of a `[rows, columns]` matrix.

        The last block of columns is shorter where they do not divide. Raises InputError where rows do not.
        """
        rows, columns = self.block
        if rows is not None and shape[0] % rows:
            raise InputError(
                f"groups of {rows} rows do not divide {shape[0]} rows ({self} on a {shape[0]}x{shape[1]} matrix); "
                f"choose a divisor such as {_near_divisors(shape[0], rows)}"
            )
        return shape[0] // rows if rows else 1, max(1, -(-shape[1] // columns)) if columns else 1


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _spelled(text: str) -> dict[str, Any]:
    """The words of a short spelling."""
    match = _SPELLING.fullmatch(text.strip())
    if match is None:
        raise InputError(
            f"cannot read {text!r} as a quantization spec; "
            "write for example int8:channel:sym, int8:token:sym, int4:group:64:sym, int4:group:32:min "
            "or int8:block:16x64:asym"
        )
    words: dict[str, Any] = {"num_bits": int(match["bits"]), "symmetric": match["sign"] in (None, "sym")}
    words["minimum"] = match["sign"] == "min" or None
    words["strategy"] = match["plain"] or match["sized"] or "block"
    words["group_size"] = int(match["size"]) if match["size"] else None
    words["block_structure"] = match["block"]
    words["dynamic"] = match["when"] == "dynamic" if match["when"] else None
    return words


def _block(strategy: str, given: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """The block (rows, columns) that a strategy and its size word describe."""
    for word in ("group_size", "block_structure"):
        if (word in given) != (_SIZE_WORD.get(strategy) == word):
            raise InputError(f"strategy '{strategy}' {'does not take' if word in given else 'needs'} {word}")
    if strategy == "block":
        return _extents(given["block_structure"])
    size = given.get("group_size")
    return {"tensor": (None, None), "group": (1, size), "rows": (size, None)}.get(strategy, (1, None))


def _extents(structure: Any) -> tuple[int | None, int | None]:
    """(rows, columns) from `[16, 64]` or `16x64`; None or `*` is the full extent."""
    if isinstance(structure, str) and (match := re.fullmatch(_EXTENT, structure)):
        structure = [None if extent == "*" else int(extent) for extent in match.groups()]
    if isinstance(structure, str) or not isinstance(structure, (list, tuple)) or len(structure) != 2:
        raise InputError(f"block_structure must be a pair [rows, columns] such as [16, 64], not {structure!r}")
    return structure[0], structure[1]


def _near_divisors(size: int, step: int) -> str:
    divisors = [divisor for divisor in range(1, size + 1) if size % divisor == 0]
    below, above = [d for d in divisors if d < step], [d for d in divisors if d > step]
    return " or ".join(str(divisor) for divisor in below[-1:] + above[:1])
