"""Bounds of integer modules against exact accumulators of the worst inputs, and models that are refused for them."""

import copy
import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qtool
from qtool import audit, golden
from qtool.errors import InputError
from qtool.inspection import inspect
from qtool.kernels.reference import integer_softmax
from qtool.nn import MODULES, IntModule
from qtool.nn.integer.activation import IntGelu
from qtool.nn.integer.block import IntAttention
from qtool.nn.integer.embedding import IntEmbeddings
from qtool.nn.integer.linear import IntLinear
from qtool.nn.integer.module import integer_outputs
from qtool.nn.integer.norm import IntNorm
from qtool.numerics.grid import Grid
from qtool.numerics.qtensor import rows_of, tile

INT32 = 2**31 - 1
BERT = "BertForSequenceClassification"
RECIPES = {
    "default": (),
    "polynomial": ("methods.ibert.gelu=polynomial",),
    "static": ("activations=int8:tensor:sym",),
    "wide": ("methods.ibert.residual_bits=23", "methods.ibert.probability_bits=16"),
}


@pytest.fixture(scope="module")
def lowered(shelf: Any) -> Any:
    """A tiny artifact by the name of its recipe, and its model; made once."""
    found: dict[str, tuple[Path, Any]] = {}

    def make(name: str) -> tuple[Path, Any]:
        if name not in found:
            source = shelf.make(f"audit-{name}", BERT, change=shelf.noise(0.1))
            entries = ["calibration.source=random", "calibration.num_samples=4", "methods.ibert.tuning=2"]
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(shelf.folder)
                patch.setattr("qtool.pipeline._check_in_fresh_process", lambda *run: None)
                output = shelf.folder / f"audit-{name}-out"
                made = qtool.quantize(str(source), method="ibert", output=output, set=[*entries, *RECIPES[name]])
            found[name] = made.path, golden.load(made.path)
        return found[name]

    return make


def bounds_of(module: IntModule) -> dict[str, Any]:
    found = module.bounds()
    assert all(isinstance(bound.reaches, int) and bound.reaches > 0 for bound in found)
    return {bound.what: bound for bound in found}


def all_of(model: Any, kind: type) -> list[tuple[str, Any]]:
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, kind)]
    assert found
    return found


def rescaled(x: int, multiplier: int, shift: int) -> int:
    """Rounded half up."""
    return (2 * x * multiplier + 2**shift) // 2 ** (shift + 1)


def clipped(x: int, bits: int) -> int:
    return max(1 - 2 ** (bits - 1), min(2 ** (bits - 1) - 1, x))


# Accumulators


@pytest.mark.parametrize("recipe", ["default", pytest.param("static", marks=pytest.mark.slow), "wide"])
def test_linears_reach_their_bounds_and_never_leave_them(lowered: Any, recipe: str) -> None:
    """Each row of weights against the codes that fit it best; what the module returns has overflown nowhere."""
    for path, module in all_of(lowered(recipe)[1], IntLinear):
        matrix = rows_of(module.weight, (module.out_features, module.in_features)).numpy().astype(np.int64)
        least, most = (-254 if module.unsigned else -127), (254 if module.unsigned else 127)
        signs = np.where(matrix > 0, 1, -1)
        # Against every row: all its weights one way, all the other, and half of them.
        inputs = np.concatenate([signs * most, signs * least, np.roll(signs, 1, 1) * most])
        inputs = np.clip(inputs, 0, None) if module.unsigned else inputs
        limit = 2 ** (module.in_bits - 1) - 1
        accumulators = inputs @ matrix.T
        amax = limit if module.dynamic else 1
        bias, align = module.bias.numpy().astype(np.int64), int(module.align)
        products = accumulators * amax
        sums = ((products + (2**align >> 1)) >> align) + bias
        bounds = bounds_of(module)
        seen = {"accumulator": accumulators, "row product": products, "aligned sum": sums}
        assert set(bounds) == set(seen), path
        for what, values in seen.items():
            assert np.abs(values).max() <= bounds[what].reaches <= bounds[what].limit, (path, what)
        columns = np.abs(matrix).sum(1).max()
        assert bounds["accumulator"].reaches == most * columns, path
        if not module.unsigned:
            assert np.abs(accumulators).max() == bounds["accumulator"].reaches, "it is reached"
        codes = torch.from_numpy(inputs - 127 if module.unsigned else inputs).to(torch.int8)
        rows = torch.full((len(codes), 1), amax) if module.dynamic else None
        with integer_outputs():
            found = module((codes, rows))
        multiplier, shift = module.multiplier.tolist(), module.shift.tolist()
        wanted = [
            [clipped(rescaled(x, m, s), module.out_bits) for x, m, s in zip(row, multiplier, shift, strict=True)]
            for row in sums.tolist()
        ]
        assert found.tolist() == wanted, path


@pytest.mark.parametrize("recipe", ["default", "wide"])
def test_norms_stay_within_their_bounds(lowered: Any, recipe: str) -> None:
    for path, module in all_of(lowered(recipe)[1], IntNorm):
        limit, n = 2 ** (module.in_bits - 1) - 1, module.size
        draw = random.Random(path)
        rows = [[limit] * n, [-limit] * n, [limit] * (n // 2) + [-limit] * (n - n // 2), [limit] + [-limit] * (n - 1)]
        rows += [[draw.choice((-limit, limit, 0)) for _ in range(n)] for _ in range(20)]
        bounds, most = bounds_of(module), 0
        for row in rows:
            mean = (2 * sum(row) + n) // (2 * n)
            variance = sum((x - mean) ** 2 for x in row) + int(module.eps)
            assert abs(sum(row)) <= 2 * abs(sum(row)) <= bounds["sum"].reaches, path  # the mean is rounded from it
            assert variance <= bounds["variance"].reaches < 2**62, path
            most = max(most, variance)
        assert 4.01 * most > bounds["variance"].reaches, "no wider than a factor that the width explains"
        found = module(torch.tensor(rows, dtype=torch.int32))
        assert found.abs().max() < 2 ** (module.out_bits - 1)


def test_attention_stays_within_its_bounds(lowered: Any) -> None:
    for path, module in all_of(lowered("default")[1], IntAttention):
        bounds, limit = bounds_of(module), 2**15 - 1
        full = np.full(module.size, 127, dtype=np.int64)
        assert full @ full == bounds["Q·K"].reaches <= bounds["Q·K"].limit, path
        product = int(full @ full) * limit
        assert product == bounds["Q·K row product"].reaches, path
        align = int(module.align)
        assert (product + (2**align >> 1)) >> align <= bounds["Q·K aligned"].reaches <= INT32, path


@pytest.mark.parametrize(("bits", "tokens"), [(14, 512), (8, 512), (16, 300)])
def test_probabilities_times_values_stay_within_their_bound(bits: int, tokens: int) -> None:
    words = {"heads": 2, "hidden": 8, "tokens": tokens, "query_bits": 16, "probability_bits": bits, "grid": 10}
    module = MODULES["int_attention"].from_description(torch.nn.Module(), "x", {**words, "out_bits": 16}, device="cpu")
    module.align.zero_()
    bound = bounds_of(module)["P·V"]
    most = 0
    for keys in range(1, tokens + 1):  # rows that are even, or fall off at once: all their roundings go one way
        for fall in (0, 1, 700):
            scores = torch.zeros(1, keys, dtype=torch.int32)
            scores[0, keys // 2 :] = -fall
            found = integer_softmax(scores, torch.ones(1, keys, dtype=torch.bool), 10, bits)
            most = max(most, 127 * int(found.sum()))
    assert 127 * 2**bits * 0.99 < most <= bound.reaches <= bound.limit == INT32


def test_sums_of_tables_stay_within_their_bound(lowered: Any) -> None:
    for path, module in all_of(lowered("default")[1], IntEmbeddings):
        largest = []
        for role in ("word", "position", "token_type"):
            table = module.part(role)
            parts = (table.weight.squeeze(1), table.multiplier, table.shift)
            rows = zip(*(part.tolist() for part in parts), strict=True)
            largest.append(max(abs(rescaled(code, m, s)) for codes, m, s in rows for code in codes))
        bound = bounds_of(module)["sum of tables"]
        assert sum(largest) <= bound.reaches <= sum(largest) + 6, path
        assert bound.reaches <= bound.limit == 2 ** (module.part("norm").in_bits - 1) - 1, path


@pytest.mark.parametrize("reach", [0.5, 4.0, 16.0, 64.0])
@pytest.mark.parametrize("bits", [8, 12, 14])
def test_the_polynomial_stays_within_its_bound(reach: float, bits: int) -> None:
    module = IntGelu(bits, shifted=True, device="cpu")
    module.lower(Grid.covering(-reach, reach, bits))
    root, one, places, _ = module.constants.tolist()
    products = []
    for x in range(1 - 2 ** (bits - 1), 2 ** (bits - 1)):
        erf = one - max(0, root - abs(x)) ** 2
        erf = erf if x > 0 else -erf if x < 0 else 0
        products.append(abs(x * ((erf + one + (2**places >> 1)) >> places)))
    bound = bounds_of(module)["polynomial"]
    assert max(products) <= bound.reaches <= bound.limit == INT32
    if reach >= 4:
        assert bound.reaches < 1.3 * max(products)


# What is refused


def linear(columns: int, unsigned: bool, **changes: Any) -> Any:
    """A row of the largest weights."""
    words: dict[str, Any] = {
        "shape": [1, columns], "weights": "int8:channel:sym", "activations": "int8:token:sym", "in_bits": 8,
        "out_bits": 22, "rescales": False, "unsigned": unsigned, "output": False,
    }  # fmt: skip
    module: Any = MODULES["int_linear"].from_description(torch.nn.Module(), "x", {**words, **changes}, device="cpu")
    module.weight = tile(torch.full((1, columns), 127, dtype=torch.int8))
    module.bias.zero_()
    module.align.fill_(20)
    module.multiplier.fill_(2**30)
    module.shift.fill_(30)
    return module


@pytest.mark.parametrize(("unsigned", "columns"), [(False, INT32 // 127**2), (True, INT32 // (254 * 127))])
def test_a_sum_that_just_fits_is_exact_and_one_more_column_is_refused(unsigned: bool, columns: int) -> None:
    module = linear(columns, unsigned)
    assert audit.check({"down": module})["down"]["spare_bits"] == 0
    most = (254 if unsigned else 127) * 127 * columns
    assert 0 <= INT32 - most < 254 * 127
    codes = torch.full((2, columns), 127, dtype=torch.int8)
    codes[1] = -127
    found = module((codes, torch.tensor([[127], [127]])))
    assert found.tolist() == [[(most * 127 + 2**19) >> 20], [0 if unsigned else (-most * 127 + 2**19) >> 20]]
    with pytest.raises(InputError, match=r"^down: the accumulator can reach 2,147,\d+,\d+, and its type holds 2,147,"):
        audit.check({"down": linear(columns + 1, unsigned)})


def test_a_bias_that_is_too_large_is_refused() -> None:
    module = linear(4, False)
    reach = 127 * 127 * 4
    module.align.zero_()
    module.bias.fill_(INT32 - 127 * reach - 1)
    assert audit.check({"x": module})["x"]["spare_bits"] == 0
    for sign in (1, -1):
        module.bias.fill_(sign * (INT32 - 127 * reach))
        with pytest.raises(InputError, match=r"^x: the aligned sum can reach 2,147,483,648, and its type holds"):
            audit.check({"x": module})


def test_a_shift_that_is_too_small_is_refused() -> None:
    module = linear(40, False, in_bits=22)
    module.align.fill_(20)
    assert audit.check({"x": module})
    module.align.fill_(9)
    with pytest.raises(InputError, match=r"^x: the aligned sum can reach"):
        audit.check({"x": module})


@pytest.mark.parametrize(("size", "fits"), [(2**14 - 1, True), (2**14, False)])
def test_a_variance_that_leaves_62_bits_is_refused(size: int, fits: bool) -> None:
    module = IntNorm(size, 24, 22, device="cpu")
    module.eps.zero_()
    if fits:
        assert audit.check({"norm": module})["norm"]["spare_bits"] == 0
    else:
        with pytest.raises(InputError, match=r"^norm: the variance can reach 4,611,686,018,427,387,904,"):
            audit.check({"norm": module})


def test_an_eps_counts_in_the_variance() -> None:
    module = IntNorm(16, 22, 22, device="cpu")
    module.eps.fill_(2**62 - 1 - 16 * 2**44)
    audit.check({"norm": module})
    module.eps += 1
    with pytest.raises(InputError, match="the variance can reach"):
        audit.check({"norm": module})


def test_a_polynomial_that_leaves_31_bits_is_refused() -> None:
    module = IntGelu(12, shifted=False, device="cpu")
    module.lower(Grid.covering(-8, 8, 12))
    audit.check({"act": module})
    module.constants[1] *= 4
    with pytest.raises(InputError, match=r"^act: the polynomial can reach"):
        audit.check({"act": module})


def test_tables_that_leave_what_the_norm_takes_are_refused(lowered: Any) -> None:
    module = copy.deepcopy(lowered("default")[1].bert.embeddings)
    audit.check({"bert.embeddings": module})
    module.position_embeddings.shift -= 12
    with pytest.raises(InputError, match=r"^bert\.embeddings: the sum of tables can reach"):
        audit.check({"bert.embeddings": module})


def test_a_module_inside_a_block_is_named_by_its_whole_path(lowered: Any) -> None:
    block = copy.deepcopy(lowered("default")[1].bert.encoder.layer[1])
    block.attention.self.value.bias.fill_(INT32)
    with pytest.raises(InputError, match=r"^bert\.encoder\.layer\.1\.attention\.self\.value: the aligned sum") as error:
        audit.check({"bert.encoder.layer.1": block})
    assert "\n" not in str(error.value) and "use fewer bits" in str(error.value)


# Figures


def test_spare_bits_are_in_the_report_and_in_what_inspect_shows(lowered: Any) -> None:
    folder, model = lowered("default")
    figures = json.loads((folder / "qtool.json").read_text())["figures"]
    shown = {row["path"]: row["spare_bits"] for row in inspect(folder)["modules"]}
    counted = 0
    for path, module in model.named_modules():
        bounds = module.bounds() if isinstance(module, IntModule) else []
        if not bounds:
            assert "spare_bits" not in figures.get(path, {})
            continue
        spare = min(len(f"{bound.limit:b}") - len(f"{bound.reaches:b}") for bound in bounds)
        assert figures[path]["spare_bits"] == spare >= 0, path
        if path in shown:
            assert shown[path] == spare
        counted += 1
    assert counted == 1 + 1 + 2 * (6 + 1 + 2) + 2  # embeddings and their norm, two blocks, pooler and classifier


def test_check_takes_the_fewest_bits_of_each_path(lowered: Any) -> None:
    modules = {path: lowered("default")[1].get_submodule(path) for path in ("bert.encoder.layer.0", "classifier")}
    found = audit.check(modules)
    listed = list(itertools.chain.from_iterable(audit.bounds(*item) for item in modules.items()))
    assert set(found) == {path for path, _ in listed} and len(listed) > len(found) == 10
    for path, figures in found.items():
        own = [bound for where, bound in listed if where == path]
        assert figures == {"spare_bits": min(b.limit.bit_length() - b.reaches.bit_length() for b in own)}


def test_a_model_that_could_overflow_is_refused_and_nothing_is_left_half_written(
    zoo: Any, desk: Path, qtool_command: Any
) -> None:
    columns = INT32 // (254 * 127) + 100

    def constant(model: Any) -> None:
        model.bert.encoder.layer[0].output.dense.weight.fill_(0.01)

    model = zoo.make("wide", BERT, change=constant, hidden_size=16, intermediate_size=columns, num_hidden_layers=1)
    entries = ["calibration.source=random", "calibration.num_samples=1", "methods.ibert.smoothing=null"]
    settings = [word for entry in (*entries, "methods.ibert.bias_correction=none") for word in ("--set", entry)]
    command = ["quantize", model, "--method", "ibert", "-o", "out", *settings]
    for more in ([], ["--resume"]):
        ended = qtool_command(*command, *more)
        assert ended.code == 3 and len(ended.errors) == 1
        assert ended.errors[0].startswith("bert.encoder.layer.0.output.dense: the accumulator can reach 2,1")
        assert [path.name for path in desk.iterdir()] == ["out.qtool-run"]
        written = [path.name for path in (desk / "out.qtool-run").rglob("*") if path.is_file()]
        assert not [name for name in written if "layer" in name or "block" in name or name.endswith(".tmp")], written
