"""I-BERT artifacts against an oracle: Python's own integers, from the bytes of the file to the logits.

The oracle reads `config.json` and `model.safetensors`, shares no code with qtool, and computes one number at a time.
What transformers returns for the same artifact must be the same integers.
"""

import functools
import json
import math
import random
import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import qtool
from qtool.nn.integer.module import integer_outputs

Row = list[int]
Rows = list[Row]
Outputs = dict[str, list[Any]]

TYPES = {"I8": "b", "I16": "h", "I32": "i", "I64": "q"}
LN2 = Fraction("0.6931471805599453094172321214581765680755")
# I-BERT's L(p) = a·p² + b·p + 1 ≈ exp(p) on (-ln 2, 0], which is a·((p + b/2a)² + (1 - b²/4a)/a).
EXP_SQUARE, EXP_SLOPE = Fraction("0.35815147"), Fraction("0.96963238")


def nearest(numerator: int, denominator: int) -> int:
    """The quotient rounded to the nearest integer, halves up."""
    return (2 * numerator + denominator) // (2 * denominator)


def clip(x: int, bits: int) -> int:
    limit: int = 2 ** (bits - 1) - 1
    return max(-limit, min(limit, x))


def dot(a: Row, b: Row) -> int:
    return sum(x * y for x, y in zip(a, b, strict=True))


def added(a: Rows, b: Rows) -> Rows:
    return [[x + y for x, y in zip(*pair, strict=True)] for pair in zip(a, b, strict=True)]


def token_codes(x: Row, unsigned: bool) -> tuple[Row, int]:
    """INT8 codes of a row and its largest magnitude M, by the reciprocal of M with 22 bits more than M has."""
    most = max(1, *map(abs, x))
    one = 2 ** (most.bit_length() + 22)
    factor = (254 if unsigned else 127) * one // most
    codes = [nearest(value * factor, one) - (127 if unsigned else 0) for value in x]
    assert all(-127 <= code <= 127 for code in codes)
    return codes, most


@functools.cache
def exp_constants(grid: int) -> tuple[int, int]:
    """b/2a and (1 - b²/4a)/a in steps of ln2 / 2^grid."""
    steps = 2**grid / LN2
    middle = EXP_SLOPE / (2 * EXP_SQUARE) * steps
    rest = (1 - EXP_SLOPE**2 / (4 * EXP_SQUARE)) / EXP_SQUARE * steps**2
    return math.floor(middle + Fraction(1, 2)), math.floor(rest + Fraction(1, 2))


def exp(distance: int, grid: int) -> int:
    """exp of -distance · ln2 / 2^grid: a parabola in the octave, halved once an octave; nothing after thirty."""
    octaves, within = divmod(distance, 2**grid)
    middle, rest = exp_constants(grid)
    return ((middle - within) ** 2 + rest) // 2**octaves if octaves < 30 else 0


def softmax(scores: Row, mask: Row, grid: int, bits: int) -> Row:
    """Probabilities in units of 2^-bits; by the reciprocal of the sum with 46 binary places."""
    allowed = [score for score, real in zip(scores, mask, strict=True) if real]
    if not allowed:
        return [0 for _ in scores]
    weights = [exp(max(allowed) - score, grid) if real else 0 for score, real in zip(scores, mask, strict=True)]
    reciprocal = 2**46 // sum(weights)
    return [min(nearest(weight * reciprocal, 2 ** (46 - bits)), 2**bits - 1) for weight in weights]


def tanh(x: int, grid: int) -> int:
    """(1 - e^-2|x|) / (1 + e^-2|x|) in units of 2^-15, with the sign of x."""
    one, power = exp(0, grid), exp(2 * abs(x), grid)
    value = min(nearest((one - power) * 2**15, one + power), 2**15 - 1)
    return -value if x < 0 else value if x > 0 else 0


def read_tensors(file: Path) -> dict[str, Row]:
    """Every integer tensor of a safetensors file, flat."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start])
    found = {}
    for name, entry in entries.items():
        if name != "__metadata__" and entry["dtype"] in TYPES:
            first, end = (start + offset for offset in entry["data_offsets"])
            found[name] = array(TYPES[entry["dtype"]], data[first:end]).tolist()
    return found


@dataclass
class Oracle:
    """An artifact; `base` is the prefix of the encoder's tensors, `read` collects names of what was needed."""

    folder: Path
    base: str
    read: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.config = json.loads((self.folder / "config.json").read_text("utf-8"))
        self.tensors = read_tensors(self.folder / "model.safetensors")
        self.modules: dict[str, dict[str, Any]] = {}
        for path, description in self.config["quantization_config"]["modules"].items():
            self._describe(path, description)

    def _describe(self, path: str, description: dict[str, Any]) -> None:
        self.modules[path] = description
        for part in description.get("parts", {}).values():
            self._describe(f"{path}.{part['path']}", part)

    def part(self, path: str, role: str) -> str:
        """The path of what plays a role in a composite."""
        return f"{path}.{self.modules[path]['parts'][role]['path']}"

    def tensor(self, name: str) -> Row:
        self.read.add(name)
        return self.tensors[name]

    def one(self, name: str) -> int:
        (value,) = self.tensor(name)
        return value

    def scaled(self, x: int, path: str, channel: int, prefix: str = "") -> int:
        """x · multiplier / 2^shift."""
        multiplier, shift = (self.tensor(f"{path}.{prefix}{name}")[channel] for name in ("multiplier", "shift"))
        return nearest(x * multiplier, 2**shift)

    def run(self, path: str, x: Rows) -> Rows:
        """One row a token through a module of any type."""
        run = getattr(self, self.modules[path]["type"])
        result: Rows = run(path, x)
        return result

    def matrix(self, path: str) -> Rows:
        """Row-major weights out of tiles of 16 rows × 4 columns, or of the table that they are shared with."""
        description = self.modules[path]
        rows, columns = description["shape"]
        if "table" in description:
            assert f"{path}.weight" not in self.tensors
            codes = self.tensors[f"{description['table']}.weight"]
            return [codes[row * columns : (row + 1) * columns] for row in range(rows)]
        codes, across = self.tensor(f"{path}.weight"), -(-columns // 4)
        assert len(codes) == -(-rows // 16) * across * 64
        return [
            [codes[((row // 16 * across + column // 4) * 16 + row % 16) * 4 + column % 4] for column in range(columns)]
            for row in range(rows)
        ]

    def codes(self, path: str, x: Rows) -> list[tuple[Row, int | None]]:
        """INT8 codes of what enters a linear, with each row's largest magnitude where codes are made token by token."""
        description = self.modules[path]
        dynamic = description["activations"] == "int8:token:sym"
        if description["rescales"]:
            bits, offset = description["in_bits"] if dynamic else 8, self.tensor(f"{path}.in_offset")
            x = [[self.scaled(value, path, i, "in_") - offset[i] for i, value in enumerate(row)] for row in x]
            x = [[clip(value, bits) for value in row] for row in x]
        if dynamic:
            return [token_codes(row, description["unsigned"]) for row in x]
        assert all(-127 <= value <= 127 for row in x for value in row)
        return [(row, None) for row in x]

    def product(self, path: str, coded: list[tuple[Row, int | None]]) -> Rows:
        description = self.modules[path]
        weights, bias, align = self.matrix(path), self.tensor(f"{path}.bias"), self.one(f"{path}.align")
        result = []
        for codes, most in coded:
            inputs = [code + 127 for code in codes] if description["unsigned"] else codes
            row = []
            for channel, weight in enumerate(weights):
                total = dot(inputs, weight)
                assert abs(total) < 2**31
                if most is not None:
                    total = nearest(total * most, 2**align)
                total += bias[channel]
                assert abs(total) < 2**31
                row.append(clip(self.scaled(total, path, channel), description["out_bits"]))
            result.append(row)
        return result

    def int_linear(self, path: str, x: Rows) -> Rows:
        return self.product(path, self.codes(path, x))

    int_tied_linear = int_linear

    def int_norm(self, path: str, x: Rows) -> Rows:
        """gamma · y / √(Σy² + n·eps) + beta, by the square root's reciprocal; gamma comes with 1/√n in it."""
        gamma, shift, beta = (self.tensor(f"{path}.{name}") for name in ("weight", "shift", "bias"))
        result = []
        for row in x:
            assert all(abs(value) < 2 ** (self.modules[path]["in_bits"] - 1) for value in row)
            mean = nearest(sum(row), len(row))
            y = [value - mean for value in row]
            variance = dot(y, y) + self.one(f"{path}.eps")
            extra = max(0, min(15, (60 - variance.bit_length()) // 2))
            reciprocal = 2 ** (46 + extra) // max(1, math.isqrt(variance * 4**extra))
            normal = [clip(nearest(value * reciprocal, 2**16), 32) for value in y]
            moved = [nearest(v * g, 2**s) + b for v, g, s, b in zip(normal, gamma, shift, beta, strict=True)]
            result.append([clip(value, self.modules[path]["out_bits"]) for value in moved])
        return result

    def int_table(self, path: str, x: Rows) -> Rows:
        table = self.tensor(f"{path}.table")
        assert len(table) == 2 ** self.modules[path]["in_bits"]
        return [[table[len(table) // 2 + value] for value in row] for row in x]

    def int_relu(self, path: str, x: Rows) -> Rows:
        return [[max(0, value) for value in row] for row in x]

    def int_tanh(self, path: str, x: Rows) -> Rows:
        return [[tanh(value, self.modules[path]["grid"]) for value in row] for row in x]

    def int_gelu(self, path: str, x: Rows) -> Rows:
        """x · (erf + 1), where erf is ±(1 - (root - |x|)²) up to its root and ±1 behind it; the sum is shifted."""
        root, one, places, offset = self.tensor(f"{path}.constants")
        shifted = self.modules[path]["shifted"]

        def gelu(value: int) -> int:
            erf = one - max(0, root - abs(value)) ** 2
            erf = erf if value > 0 else -erf if value < 0 else 0
            y = self.scaled(value * nearest(erf + one, 2**places), path, 0) + offset
            return clip(max(0, y) if shifted else y, 16)

        return [[gelu(value) for value in row] for row in x]

    def int_chain(self, path: str, x: Rows) -> Rows:
        description = self.modules[path]
        x = x[:1] if description["first"] else x
        # A linear, its activation, LayerNorm, the output: JSON's alphabet says nothing about the order.
        order = ("linear", "act", "gelu", "tanh", "norm", "output")
        assert set(description["parts"]) <= set(order)
        for role in order:
            x = self.run(self.part(path, role), x) if role in description["parts"] else x
        return x

    def int_embeddings(self, path: str, ids: Row, types: Row, positions: Row) -> Rows:
        total = self.rows(self.part(path, "word"), ids)
        for role, indices in (("position", positions), ("token_type", types)):
            if role in self.modules[path]["parts"]:
                total = added(total, self.rows(self.part(path, role), indices))
        return self.run(self.part(path, "norm"), total)

    def rows(self, path: str, indices: Row) -> Rows:
        """Rows of a table, each by its own factor."""
        width, codes = self.modules[path]["shape"][1], self.tensor(f"{path}.weight")
        return [[self.scaled(codes[i * width + column], path, i) for column in range(width)] for i in indices]

    def positions(self, ids: Row) -> Row:
        """From 0, or, as RoBERTa does, counted over tokens that are not padding, from behind the padding's own."""
        padding = self.modules[f"{self.base}embeddings"]["padding_idx"]
        if padding is None:
            return list(range(len(ids)))
        return [
            padding + (0 if ids[at] == padding else sum(i != padding for i in ids[: at + 1])) for at in range(len(ids))
        ]

    def int_attention(self, path: str, mask: Row, query: Rows, key: Rows, value: Rows) -> Rows:
        words, align = self.modules[path], self.one(f"{path}.align")
        size = words["hidden"] // words["heads"]
        result: Rows = [[] for _ in query]
        for head in range(words["heads"]):
            channels = range(head * size, (head + 1) * size)
            q, k, v = ([[row[channel] for channel in channels] for row in x] for x in (query, key, value))
            for token, row in enumerate(q):
                codes, most = token_codes(row, unsigned=False)
                products = [nearest(dot(codes, other) * most, 2**align) for other in k]
                scores = [clip(self.scaled(product, path, head, "score_"), 24) for product in products]
                weights = softmax(scores, mask, words["grid"], words["probability_bits"])
                context = [dot(weights, [other[at] for other in v]) for at in range(size)]
                moved = (self.scaled(x, path, channel) for x, channel in zip(context, channels, strict=True))
                result[token] += [clip(x, words["out_bits"]) for x in moved]
        return result

    def int_block(self, path: str, x: Rows, mask: Row) -> Rows:
        at = functools.partial(self.part, path)
        codes = self.codes(at("query"), x)
        q, k, v = (self.product(at(role), codes) for role in ("query", "key", "value"))
        context = self.int_attention(at("attention"), mask, q, k, v)
        x = self.run(at("attention_norm"), added(x, self.run(at("output"), context)))
        inner = self.run(at("act"), self.run(at("up"), x))
        return self.run(at("ffn_norm"), added(x, self.run(at("down"), inner)))

    def states(self, ids: Row, mask: Row, types: Row, positions: Row | None = None) -> list[Rows]:
        """What enters the first block, and what leaves each."""
        places = self.positions(ids) if positions is None else positions
        x = self.int_embeddings(f"{self.base}embeddings", ids, types, places)
        if f"{self.base}embeddings_project" in self.modules:
            x = self.run(f"{self.base}embeddings_project", x)
        found = [x]
        blocks = (path for path, module in self.modules.items() if module["type"] == "int_block")
        for path in sorted(blocks, key=lambda path: int(path.rpartition(".")[2])):
            found.append(self.int_block(path, found[-1], mask))
        return found

    def hidden(self, *text: Any) -> Rows:
        """What leaves the last block; zeros at padding."""
        return [[real * value for value in row] for row, real in zip(self.states(*text)[-1], text[1], strict=True)]


SEQUENCE, TOKENS, ANSWERS, MASKED = (
    f"For{head}" for head in ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM")
)
STEPS: dict[str, tuple[str, ...]] = {
    f"Bert{SEQUENCE}": ("bert.pooler", "classifier"),
    f"Bert{TOKENS}": ("classifier",),
    f"Bert{ANSWERS}": ("qa_outputs",),
    f"Bert{MASKED}": ("cls",),
    f"Roberta{SEQUENCE}": ("classifier",),
    f"Roberta{MASKED}": ("lm_head",),
    f"DistilBert{SEQUENCE}": ("first", "pre_classifier", "relu", "classifier"),
    f"DistilBert{MASKED}": ("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"),
    f"Electra{SEQUENCE}": ("classifier",),
    f"Electra{TOKENS}": ("classifier",),
    f"Electra{MASKED}": ("generator_predictions", "generator_lm_head"),
}
"""What transformers runs behind the encoder, in its order."""
OWN: dict[str, Callable[[Rows], Rows]] = {
    "first": lambda x: x[:1],
    "relu": lambda x: [[max(0, value) for value in row] for row in x],
}
"""Steps that are transformers' own code on integers."""
LAST = {
    f"Bert{MASKED}": "cls.predictions.decoder",
    f"Roberta{SEQUENCE}": "classifier.out_proj",
    f"Roberta{MASKED}": "lm_head.decoder",
    f"Electra{SEQUENCE}": "classifier.out_proj",
}
"""Where logits are made, if that is inside the last step."""


def head(oracle: Oracle, architecture: str, hidden: Rows) -> Rows:
    x = hidden
    for step in STEPS[architecture]:
        x = OWN[step](x) if step in OWN else oracle.run(step, x)
    return x


def prefix(architecture: str) -> str:
    kind = next((name for name in ("DistilBert", "Roberta", "Electra") if architecture.startswith(name)), "Bert")
    return "" if architecture.endswith("Model") else f"{kind.lower()}."


def expected(oracle: Oracle, architecture: str, texts: list[tuple[Row, Row, Row]]) -> Outputs:
    """What the model should return for `(ids, mask, token types)` of each text, under transformers' names."""
    hidden = [oracle.hidden(*text) for text in texts]
    if architecture.endswith("Model"):
        pooled = [oracle.run("pooler", rows)[0] for rows in hidden] if "pooler" in oracle.modules else []
        return {"last_hidden_state": hidden, **({"pooler_output": pooled} if pooled else {})}
    logits = [head(oracle, architecture, rows) for rows in hidden]
    if architecture.endswith(ANSWERS):
        return {
            "start_logits": [[token[0] for token in rows] for rows in logits],
            "end_logits": [[token[1] for token in rows] for rows in logits],
        }
    return {"logits": [rows[0] for rows in logits] if architecture.endswith(SEQUENCE) else logits}


VOCABULARY, PAD, LENGTH = 65, 1, 9
# Nothing is a multiple of a tile's 16 rows and 4 columns, so that its padding is there to be left out.
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 18, "intermediate_size": 34, "max_position_embeddings": 24,
    "pad_token_id": PAD,
}  # fmt: skip
ELECTRA = {"embedding_size": 14}


def batch() -> list[tuple[Row, Row, Row]]:
    """A full text, one padded on the right, and one of a single token: ids, mask and token types."""
    draw = torch.Generator().manual_seed(0)
    texts = []
    for real in (LENGTH, 5, 1):
        ids = torch.randint(2, VOCABULARY, (LENGTH,), generator=draw).tolist()
        types = torch.randint(2, (LENGTH,), generator=draw).tolist()
        mask = [int(at < real) for at in range(LENGTH)]
        texts.append(([i if on else PAD for i, on in zip(ids, mask, strict=True)], mask, types))
    return texts


@dataclass(frozen=True)
class Made:
    """A loaded artifact and its oracle."""

    architecture: str
    model: Any
    oracle: Oracle

    def outputs(self, texts: list[tuple[Row, Row, Row]], **options: Any) -> Any:
        """What transformers gives."""
        ids, mask, types = (torch.tensor(column) for column in zip(*texts, strict=True))
        if "token_type" in self.oracle.modules[f"{self.oracle.base}embeddings"]["parts"]:
            options["token_type_ids"] = types
        with torch.inference_mode():
            return self.model(input_ids=ids, attention_mask=mask, **options)

    def exponent(self, name: str) -> int:
        """Binary places of an output."""
        if name == "pooler_output":
            return 15
        if self.architecture not in STEPS:
            return self.oracle.tensor("embeddings.exponents")[1]
        return self.oracle.one(f"{LAST.get(self.architecture, STEPS[self.architecture][-1])}.exponent")


def make(zoo: Any, architecture: str, *settings: str, noise: float = 0.1, **options: Any) -> Made:
    """A random model, quantized into the working directory and loaded."""
    shape = {**SHAPE, **(ELECTRA if architecture.startswith("Electra") else {}), **options}
    shape |= {"num_labels": 3} if architecture.endswith((SEQUENCE, TOKENS)) else {}
    shape |= {"hidden_dim": shape["intermediate_size"]} if architecture.startswith("DistilBert") else {}
    folder = zoo.make("float", architecture, words=None, change=zoo.noise(noise) if noise else None, **shape)
    data = ("calibration.source=random", "calibration.num_samples=4")
    made = qtool.quantize(str(folder), method="ibert", output="out", set=[*data, *settings])
    model = getattr(transformers, architecture).from_pretrained(made.path).eval()
    return Made(architecture, model, Oracle(made.path, prefix(architecture)))


def check(made: Made) -> None:
    """Integers equal the oracle's, and the floats that users get are these times a power of two."""
    texts = batch()
    floats = made.outputs(texts)
    with integer_outputs():
        integers = made.outputs(texts)
    wanted = expected(made.oracle, made.architecture, texts)
    assert set(integers.keys()) == set(wanted)
    for name, numbers in wanted.items():
        assert integers[name].dtype == torch.int32
        assert integers[name].tolist() == numbers, name
        flat = integers[name].flatten().tolist()
        assert len(set(flat)) > 2, "numbers that say something"
        places = made.exponent(name)
        assert floats[name].flatten().tolist() == pytest.approx([x / 2**places for x in flat], rel=2**-24, abs=0)
    unread = {name for name in made.oracle.tensors if not name.endswith(("exponent", "exponents"))} - made.oracle.read
    assert not unread, "a tensor that means something"


HEADS = [
    f"Bert{SEQUENCE}", f"Bert{MASKED}", "BertModel", f"Roberta{SEQUENCE}", f"DistilBert{SEQUENCE}", f"Electra{MASKED}",
]  # fmt: skip
OTHER_HEADS = [
    *(f"Bert{kind}" for kind in (TOKENS, ANSWERS)),
    *(f"{family}{MASKED}" for family in ("Roberta", "DistilBert")),
    *(f"Electra{kind}" for kind in (SEQUENCE, TOKENS)),
    "DistilBertModel", "ElectraModel",
]  # fmt: skip


@pytest.mark.parametrize("architecture", [*HEADS, *(pytest.param(x, marks=pytest.mark.slow) for x in OTHER_HEADS)])
def test_every_integer_is_the_oracles(architecture: str, zoo: Any, desk: Path) -> None:
    check(make(zoo, architecture))


def extremes(bits: int, width: int, unsigned: bool, draw: random.Random) -> Rows:
    """Rows of integers of `bits`: alike, nearly alike, at both ends, halfway between INT8 codes, of every magnitude."""
    limit = 2 ** (bits - 1) - 1
    least = 0 if unsigned else -limit
    step = draw.choice([step for step in (1, 3, 5, 2**4, 2**8 + 1) if 254 * step <= limit] or [0])
    rows = [[level] * width for level in (0, 1, limit, least, draw.randint(least, limit))]
    rows += [[level] * (width - 1) + [level + 1] for level in (0, limit - 1, draw.randint(least, limit - 1))]
    rows += [[draw.choice((least, limit)) for _ in range(width)], [limit] + [least] * (width - 1)]
    rows += [[254 * step] + [max(least, draw.randint(-254, 254) * step) for _ in range(width - 1)]]
    for places in range(bits):
        middle, reach = draw.randint(least, limit), 2**places
        rows.append([max(least, min(limit, middle + draw.randint(-reach, reach))) for _ in range(width)])
        rows.append([max(least, draw.randint(-reach, reach - 1)) for _ in range(width)])
    return rows


def alone(made: Made, path: str, draw: random.Random) -> None:
    """One module and its oracle on the same integers."""
    words, module = made.oracle.modules[path], made.model.get_submodule(path)
    kind, width = words["type"], words.get("size") or words.get("shape", (0, 48))[1]
    if kind == "int_attention":
        queries = extremes(words["query_bits"], words["hidden"], False, draw)
        pairs = [[[draw.choice((-127, 127, draw.randint(-127, 127))) for _ in row] for row in queries] for _ in "kv"]
        for real in (0.0, 0.1, 1.0):
            mask = [int(draw.random() < real) for _ in queries]
            inputs = [torch.tensor([rows], dtype=torch.int32) for rows in (queries, *pairs)]
            found = module(inputs[0], *(x.to(torch.int8) for x in inputs[1:]), torch.tensor([mask]) != 0)
            assert found[0].tolist() == made.oracle.int_attention(path, mask, queries, *pairs), path
        return
    # Static codes of key and value are the query's.
    ready = words.get("activations") == "int8:tensor:sym" and not words["rescales"]
    rows = extremes(8 if ready else words.get("in_bits", 20), width, words.get("unsigned", False), draw)
    with integer_outputs():
        found = module(torch.tensor(rows, dtype=torch.int32))
    assert found.tolist() == made.oracle.run(path, rows), path


OPTIONS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "polynomial": (
        f"Bert{MASKED}", ("methods.ibert.gelu=polynomial", "methods.ibert.gelu_bits=14"),
        {"initializer_range": 1.0},
    ),
    "polynomial, unshifted": (
        f"Electra{SEQUENCE}", ("methods.ibert.gelu=polynomial", "methods.ibert.shifted_gelu=false"), {},
    ),
    "static": (f"Bert{SEQUENCE}", ("activations=int8:tensor:sym",), {}),
    "static, no smoothing": (f"Roberta{MASKED}", ("activations=int8:tensor:sym", "methods.ibert.smoothing=null"), {}),
    "static, polynomial": (
        f"DistilBert{MASKED}", ("activations=int8:tensor:sym", "methods.ibert.gelu=polynomial"), {},
    ),
    "nothing before rounding": (
        f"Bert{SEQUENCE}", ("methods.ibert.smoothing=null", "methods.ibert.centering=false"), {},
    ),
    "static in places": (
        f"Electra{TOKENS}",
        ("rules={'*.0.intermediate.dense': {activations: 'int8:tensor:sym'}, "
         "'*.1.output.dense': {activations: 'int8:tensor:sym'}}",),
        {},
    ),
    "unshifted table": (f"Bert{ANSWERS}", ("methods.ibert.shifted_gelu=false",), {}),
    "relu": ("BertModel", (), {"hidden_act": "relu"}),
    "relu, static": (f"DistilBert{SEQUENCE}", ("activations=int8:tensor:sym",), {"activation": "relu"}),
    "silu": (f"Roberta{SEQUENCE}", (), {"hidden_act": "silu"}),
    "narrow": (
        f"Bert{SEQUENCE}",
        ("methods.ibert.residual_bits=12", "methods.ibert.probability_bits=8", "methods.ibert.scores_grid=6"), {},
    ),
    "wide": (
        f"Bert{SEQUENCE}",
        ("methods.ibert.residual_bits=23", "methods.ibert.probability_bits=16", "methods.ibert.scores_grid=12"), {},
    ),
    "shared scales": (
        f"Bert{TOKENS}",
        ("methods.ibert.attention_scales=head", "weights=int8:tensor:sym",
         "methods.ibert.word_embeddings=int16:tensor:sym", "methods.ibert.small_embeddings=int8:channel:sym"), {},
    ),
    "few bits": (f"Bert{MASKED}", ("weights=int5:channel:sym", "methods.ibert.attention_scales=tensor"), {}),
    "untied": (f"Bert{MASKED}", (), {"tie_word_embeddings": False}),
    "bias correction": (f"Bert{SEQUENCE}", ("methods.ibert.bias_correction=quantized",), {}),
    "one layer, four heads": (f"Bert{SEQUENCE}", (), {
        "num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 20,
    }),
}  # fmt: skip
EVERY_TIME = ("polynomial", "static")


@pytest.mark.parametrize(
    "name", [name if name in EVERY_TIME else pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS]
)
def test_under_every_option(name: str, zoo: Any, desk: Path) -> None:
    """Whole texts, and each module by itself on integers from its whole range, where no text leads."""
    architecture, settings, options = OPTIONS[name]
    made = make(zoo, architecture, *settings, **options)
    check(made)
    draw = random.Random(name)
    for path, words in made.oracle.modules.items():
        if "parts" not in words and words["type"] != "int_rows" and not re.search(r"layer\.[1-9]", path):
            alone(made, path, draw)


@pytest.mark.parametrize("architecture", [f"Bert{MASKED}", pytest.param(f"Roberta{MASKED}", marks=pytest.mark.slow)])
def test_rows_without_variance(architecture: str, zoo: Any, desk: Path) -> None:
    """Biases of a fresh model are zero: at padding nothing enters the head's LayerNorm, and β leaves it."""
    check(make(zoo, architecture, noise=0.0))


def test_hidden_states_and_padding(zoo: Any, desk: Path) -> None:
    """Holes in a mask, a text of padding alone, positions of one's own; only the last state is zero at padding."""
    made = make(zoo, "BertModel")
    (ids, _, types), *_ = batch()
    masks = [[1, 0, 1, 1, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1, 1, 1], [0] * LENGTH]
    positions = list(range(LENGTH, 0, -1))
    texts = [(ids, mask, types) for mask in masks]
    with integer_outputs():
        output = made.outputs(texts, output_hidden_states=True, position_ids=torch.tensor([positions] * len(masks)))
    states = [made.oracle.states(*text, positions) for text in texts]
    between = [list(rows) for rows in zip(*states, strict=True)][:-1]
    assert [state.tolist() for state in output.hidden_states[:-1]] == between
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    for text, last, found in zip(texts, states, output.last_hidden_state.tolist(), strict=True):
        for real, row, given in zip(text[1], last[-1], found, strict=True):
            assert given == (row if real else [0] * len(row))


@pytest.mark.parametrize("architecture", [f"Bert{SEQUENCE}", pytest.param(f"Roberta{MASKED}", marks=pytest.mark.slow)])
def test_ids_alone(architecture: str, zoo: Any, desk: Path) -> None:
    """Without a mask every token is real, and without token types all are 0."""
    made = make(zoo, architecture)
    (ids, *_), *_ = batch()
    with integer_outputs(), torch.inference_mode():
        found = made.model(torch.tensor([ids])).logits
    assert found.tolist() == expected(made.oracle, architecture, [(ids, [1] * LENGTH, [0] * LENGTH)])["logits"]


def test_a_text_does_not_depend_on_its_padding(zoo: Any, desk: Path) -> None:
    made = make(zoo, f"Bert{SEQUENCE}")
    for ids, mask, types in batch():
        real = sum(mask)
        texts = [(ids, mask, types)], [(ids[:real], mask[:real], types[:real])]
        with integer_outputs():
            padded, alone = (made.outputs(list(text)).logits.tolist() for text in texts)
        assert padded == alone
