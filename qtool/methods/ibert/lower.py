"""From float weights and statistics to filled integer modules, one unit at a time."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from qtool.anatomy import Unit
from qtool.calibrate import ranges
from qtool.calibrate.statistics import Statistics
from qtool.errors import InputError
from qtool.methods.base import weight_sqnr_db
from qtool.methods.ibert.layout import (
    ACT_BITS,
    CONTEXT_BITS,
    HEAD_BITS,
    HIDDEN_BITS,
    QUERY_BITS,
    TANH_IN_BITS,
    TANH_PLACES,
    IBertOptions,
    Layout,
)
from qtool.nn import MODULES, QModule, install, parts_of
from qtool.nn.integer.activation import IntGelu, IntTable
from qtool.numerics import QTensor, QuantSpec
from qtool.numerics.grid import Grid
from qtool.recipe import Recipe
from qtool.rounding import ROUNDINGS
from qtool.rounding.smooth import smoothing, tuned_smoothing
from qtool.stream import Reader

_HEADROOM = 2.0
"""Wide grids cover twice what calibration saw: a bit is cheap there, saturation is not."""
_LN2 = math.log(2)
_DEAD = 1e-6
_LOWEST, _NEGLIGIBLE = -16.0, 5e-4  # where an activation's table starts looking, and the value that it may drop


class Lowering:
    """Everything that the units of one model share: statistics, the residual grid, figures of what was lowered.

    `grids` says, for every linear and norm that was lowered, on which grid its output is.
    """

    def __init__(self, layout: Layout, recipe: Recipe, options: IBertOptions, statistics: Statistics) -> None:
        self.layout, self.recipe, self.options, self.statistics = layout, recipe, options, statistics
        self.residual = self._residual()
        self.figures: dict[str, dict[str, float]] = {}
        self.grids: dict[str, Grid] = {}

    def unit(self, unit: Unit, descriptions: Mapping[str, Any], weights: Reader) -> dict[str, QModule]:
        """Filled modules of a unit by path."""
        self.weights = weights
        shell = nn.Module()
        modules: dict[str, QModule] = {}
        for path, description in descriptions.items():
            if unit.owns(path):
                if any("table" in part for _, part in parts_of(path, description)):
                    self._add_table(shell, descriptions)
                module = MODULES[description["type"]].from_description(shell, path, description, device="cpu")
                modules[path] = module
        if unit.kind == "embeddings":
            self._embeddings(modules)
        elif unit.kind == "block":
            self._block(unit, modules[unit.modules[0]])
        else:
            self._head(modules)
        return modules

    # Statistics

    def _observed(self, path: str) -> Any:
        """The state of a site under whichever observer watched it, or None."""
        names = ("histogram", "channels", "minmax")
        return next(
            (self.statistics.states[path, name] for name in names if (path, name) in self.statistics.states), None
        )

    def _state(self, path: str, observer: str = "channels") -> Any:
        found = self._observed(path) if observer == "channels" else None
        return self.statistics.state(path, observer) if found is None else found

    def _peak(self, path: str) -> torch.Tensor:
        return ranges.peak(self._state(path))

    def _residual(self) -> Grid:
        """A power of two, so that hidden states leave a bare encoder exactly."""
        paths = [self.layout.block_paths(unit) for unit in self.layout.anatomy.blocks]
        roles = ("query", "up", "attention_norm", "ffn_norm")
        largest = max(float(self._peak(path[role]).max()) for path in paths for role in roles)
        bits = self.options.residual_bits
        exponent = bits - 1 - int(torch.frexp(torch.tensor(max(largest, 1e-6) * _HEADROOM)).exponent)
        return Grid(2.0**-exponent, bits)

    def _middle(self, path: str, *, static: bool = False) -> torch.Tensor:
        """What is taken out of each channel, float64 `[features]`: its mean, or for a static range its middle."""
        state = self._state(path)
        if "counts" in state or not self.options.centering or self.options.clipping == "token":
            return torch.zeros_like(ranges.peak(state))
        middle: torch.Tensor = (state["min"].double() + state["max"].double()) / 2 if static else state["mean"]
        return middle

    def _reach(self, path: str, center: torch.Tensor | float) -> torch.Tensor:
        """The largest distance of each channel from `center`, float64 `[features]`."""
        state = self._state(path)
        if "counts" in state:
            return ranges.peak(state) + torch.as_tensor(center).abs()
        return torch.maximum(state["max"].double() - center, center - state["min"].double())

    def _clipped(self, state: Any, qmax: int = 127) -> torch.Tensor:
        """The static range of each channel."""
        how = self.options.clipping
        if how == "percentile":
            return ranges.percentile(state, self.options.percentile)
        return ranges.least_squares(state, qmax) if how == "mse" else ranges.peak(state)

    def _static_scale(self, path: str, smooth: torch.Tensor | None, center: torch.Tensor | float) -> float | None:
        """The step of static INT8 codes of the input at `path` less `center`; None where codes are made by token."""
        if self.layout.dynamic(path):
            return None
        if self.options.clipping == "token":
            limit = ranges.percentile(self._state(f"{path}:peaks", "token-peaks"), self.options.percentile)
        else:
            state = self._state(path)
            division = torch.ones_like(ranges.peak(state)) if smooth is None else smooth
            limit = (
                self._clipped(ranges.merged(state, division))
                if "counts" in state
                else self._reach(path, center) / division
            )
        return max(float(limit.max()), 1e-30) / 127

    # Weights

    def _smooth(self, peaks: torch.Tensor, middle: torch.Tensor | float, *paths: str) -> torch.Tensor | None:
        """What the input of the linears at `paths` is divided by, once `middle` is taken out of it."""
        alpha = self.options.smoothing
        if alpha is None:
            return None
        weights = [self.weights(f"{path}.weight") for path in paths]
        start = smoothing(peaks, weights, alpha)
        if not self.options.tuning:
            return start
        sample = self._state(f"{paths[0]}:sample", "sample")["rows"] - middle
        return tuned_smoothing(sample, weights, start, steps=self.options.tuning)

    def _codes(self, path: str, smooth: torch.Tensor | None = None) -> QTensor:
        """The rounded matrix at `path`, with the input's division multiplied in."""
        rule = self.recipe.rule_for(path)
        weight = self.weights(f"{path}.weight")
        scaled = weight if smooth is None else (weight.double() * smooth).float()
        spec = rule.weights or self.recipe.weights.spec
        codes = ROUNDINGS[self.recipe.weights.rounding](scaled, spec, layout="tiled")
        self.figures[path] = {"weight_sqnr_db": weight_sqnr_db(scaled, codes)}
        return codes

    def _bias(self, path: str) -> torch.Tensor | None:
        return None if self.layout.model.get_submodule(path).bias is None else self.weights(f"{path}.bias").double()

    def _linear(
        self,
        module: Any,
        path: str,
        source: Grid,
        target: Grid,
        *,
        reads: str | None = None,
        measured: bool = True,
        **options: Any,
    ) -> None:
        """Fill one linear; `reads` is the path whose input it shares.

        `measured` is false where an activation follows: its grid leaves out what that turns to zero.
        """
        codes = self._codes(path, options.get("smooth"))
        if self.options.bias_correction != "none" and (state := self._observed(reads or path)) is not None:
            options |= {"exact": self.weights(f"{path}.weight"), "mean": state.get("mean")}
        with _naming(path):
            module.lower(codes, self._bias(path), source, target, **options)
        if measured:
            self.grids[path] = target

    def _norm(self, module: Any, path: str, source: Grid, target: Grid | None = None) -> None:
        target = target or self.residual
        eps = self.layout.model.get_submodule(path).eps
        module.lower(self.weights(f"{path}.weight"), self.weights(f"{path}.bias"), eps, source, target)
        self.grids[path] = target

    def _hidden(self) -> Grid:
        """The grid of what leaves the last block: a power of two that no output of its LayerNorm exceeds."""
        path = self.layout.block_paths(self.layout.anatomy.blocks[-1])["ffn_norm"]
        weight, bias = (self.weights(f"{path}.{name}").double().abs() for name in ("weight", "bias"))
        reach = (weight * len(weight) ** 0.5 + bias).max().clamp_min(1e-6)
        return Grid(2.0 ** -(HIDDEN_BITS - 2 - int(torch.frexp(reach).exponent)), HIDDEN_BITS)

    # Units

    def _table(self, path: str, description: Mapping[str, Any]) -> QTensor:
        table = QTensor.quantize(self.weights(f"{path}.weight"), QuantSpec.parse(description["weights"]))
        self.figures[path] = {"weight_sqnr_db": weight_sqnr_db(self.weights(f"{path}.weight"), table)}
        return table

    def _embeddings(self, modules: dict[str, QModule]) -> None:
        layout = self.layout
        module: Any = modules[f"{layout.base}embeddings"]
        paths = {name: f"{layout.base}{path}" for name, path in layout.family.tables.items()}
        tables = {name: self._table(paths[name], module.part(name).description()) for name in paths}
        largest = {name: table.dequantize().abs().max().item() for name, table in tables.items()}
        small = max((peak for name, peak in largest.items() if name != "word"), default=0.0)
        # Fine enough for 16 bits of the small tables; LayerNorm takes 24 bits of the sum.
        unit = max(small / (1 << 15), sum(largest.values()) / (1 << 22), 1e-30)
        for name, table in tables.items():
            module.part(name).lower(table, unit)
        self._norm(module.part("norm"), layout.embedding_norm, Grid(unit, HEAD_BITS))
        units = torch.tensor([float(self.residual.unit), float(self._hidden().unit)], dtype=torch.float64)
        module.exponents = 1 - torch.frexp(units).exponent
        nn.init.zeros_(module.anchor)
        if layout.projection is not None:
            self._linear(modules[layout.projection], layout.projection, self.residual, self.residual)

    def _block(self, unit: Unit, block: Any) -> None:
        paths, residual = self.layout.block_paths(unit), self.residual
        context, smooth = self._attention(block, paths)
        scale = self._static_scale(paths["output"], smooth, context.center)
        self._linear(block.part("output"), paths["output"], context, residual, smooth=smooth, act_scale=scale)
        self._norm(block.part("attention_norm"), paths["attention_norm"], residual)
        middle = self._middle(paths["up"])
        smooth = self._smooth(self._reach(paths["up"], middle), middle, paths["up"])
        inner = self._act_input(paths["up"], self.layout.act, block.part("up").out_bits)
        scale = self._static_scale(paths["up"], smooth, middle)
        options: dict[str, Any] = {"smooth": smooth, "middle": middle, "act_scale": scale}
        self._linear(block.part("up"), paths["up"], residual, inner, measured=False, **options)
        shifted = self.layout.shifts(paths["down"])
        values = self._act(block.part("act"), self.layout.act, inner, shifted=shifted)
        smooth = self._smooth(self._reach(paths["down"], values.center), values.center, paths["down"])
        scale = self._static_scale(paths["down"], smooth, values.center)
        self._linear(block.part("down"), paths["down"], values, residual, smooth=smooth, act_scale=scale)
        last = unit is self.layout.anatomy.blocks[-1]
        self._norm(block.part("ffn_norm"), paths["ffn_norm"], residual, self._hidden() if last else residual)

    def _attention(self, block: Any, paths: Mapping[str, str]) -> tuple[Grid, torch.Tensor | None]:
        """Q, K, V and what joins them; returns the grid of the context and the smoothing of what reads it."""
        names = [paths[role] for role in ("query", "key", "value")]
        middle = self._middle(paths["query"])
        smooth = self._smooth(self._reach(paths["query"], middle), middle, *names)
        scale = self._static_scale(paths["query"], smooth, middle)
        outputs = [f"{path}:output" for path in names[1:]]
        attention = block.part("attention")
        # What all keys have in common moves all scores of a row alike, and what all values have passes through.
        middles = [self._middle(output, static=True) for output in outputs]
        if not attention.sums_to_one:
            middles[1] = torch.zeros_like(middles[1])
        pairs = zip(outputs, middles, strict=True)
        key, value = (self._shared(self._limits(output, middle)) / 127 for output, middle in pairs)
        heads = (attention.heads, attention.size)
        # Each channel of the query takes the unit of its key along: a row of scores then has one scale.
        largest = (self._peak(f"{names[0]}:output") * key).view(heads).amax(1)
        largest = largest.clamp_min(_DEAD * float(largest.max()) or 1.0)
        query = largest * _HEADROOM / ((1 << (QUERY_BITS - 1)) - 1)
        targets = (
            Grid(query.repeat_interleave(heads[1]) / key, QUERY_BITS),
            Grid(key, 8, middles[0]),
            Grid(value, 8, middles[1]),
        )
        read = self.residual
        options: dict[str, Any] = {"smooth": smooth, "middle": middle, "act_scale": scale, "reads": names[0]}
        for role, path, target in zip(("query", "key", "value"), names, targets, strict=True):
            self._linear(block.part(role), path, read, target, **options)
            if role == "query" and block.part("query").rescales:  # key and value get what the query has divided
                least = 1.0 if smooth is None else smooth.min().item()
                read = Grid(float(self.residual.unit) / least, self.residual.bits)
        peaks = self._reach(paths["output"], middles[1])
        smooth = self._smooth(peaks, middles[1], paths["output"])
        # Attention divides on its way out for nothing, unless the product has to rescale its input anyway.
        division = torch.ones_like(peaks) if smooth is None or block.part("output").rescales else smooth
        unit = max(float((peaks / division).max()), 1e-30) * _HEADROOM / ((1 << (CONTEXT_BITS - 1)) - 1)
        attention.lower(Grid(query, QUERY_BITS), value, Grid(unit * division, CONTEXT_BITS))
        return Grid(unit, CONTEXT_BITS, middles[1]), smooth

    def _limits(self, output: str, middle: torch.Tensor) -> torch.Tensor:
        """How far 8-bit codes of each channel reach from `middle`."""
        if self.options.clipping in ("mse", "percentile"):
            return self._clipped(self._state(output))
        return self._reach(output, middle)

    def _shared(self, limits: torch.Tensor) -> torch.Tensor:
        """Limits of channels made those of what shares a scale; a dead channel gets a millionth of the largest."""
        limits = limits.clamp_min(_DEAD * float(limits.max()) or 1.0)
        how, size = self.options.attention_scales, self.layout.size
        if how == "channel":
            return limits
        if how == "tensor":
            return limits.amax().expand_as(limits)
        return limits.view(-1, size).amax(1, keepdim=True).expand(-1, size).flatten()

    def _act_input(self, path: str, act: str, bits: int) -> Grid:
        """The grid on which the activation behind the linear at `path` reads its input."""
        state = self._state(f"{path}:output", "minmax")
        low, high = float(state["min"]), max(float(state["max"]), 0.5)
        if not self.layout.tabled(act):
            return (
                Grid.covering(-max(high, 4.0), high, bits)
                if act == "gelu"
                else Grid.covering(low, high * _HEADROOM, bits)
            )
        x = torch.linspace(_LOWEST, 0, 1601, dtype=torch.float64)
        kept = (_function(act)(x).abs() > _NEGLIGIBLE).nonzero()
        return Grid.covering(max(low, float(x[int(kept[0])])), high, bits, centered=True)

    def _act(self, module: Any, act: str, source: Grid, *, shifted: bool) -> Grid:
        if isinstance(module, IntTable):
            return module.lower(_function(act), source, shifted=shifted)
        if isinstance(module, IntGelu):
            return module.lower(source)
        return Grid(source.unit, source.bits, unsigned=True)

    def _head(self, modules: dict[str, QModule]) -> None:
        layout, places = self.layout, self.options.scores_grid
        grid = self._hidden()
        for layer in layout.head_layers():
            holder: Any = modules[layer.module.path]
            inside = layer.path.removeprefix(layer.module.path).removeprefix(".")
            module: Any = holder.get_submodule(inside)
            if layer.kind in ("hidden", "output"):
                grid = self._output(module, layer.path, grid)
            elif layer.kind == "linear":
                bits = module.out_bits
                if layer.follows == "tanh":
                    target = Grid(_LN2 / 2**places, TANH_IN_BITS)
                else:
                    act = layout.act if layer.follows == "act" else "gelu"
                    target = self._act_input(layer.path, act, bits)
                self._linear(module, layer.path, grid, target, measured=layer.follows == "tanh")
                grid = target
            elif layer.kind == "norm":
                self._norm(module, layer.path, grid)
                grid = self.residual
            elif layer.kind == "tanh":
                pooler = layer.module.path == f"{layout.base}pooler"
                tanh = Grid(2.0**-TANH_PLACES, ACT_BITS)
                grid = tanh if not pooler or layout.starts_pooled() else self._hidden()
            else:
                grid = self._act(module, layout.act if layer.kind == "act" else "gelu", grid, shifted=False)

    def _output(self, module: Any, path: str, source: Grid) -> Grid:
        """Logits, or hidden numbers whose range nobody observed: a grid that no input can leave."""
        table = module.words.get("table")
        codes = self._table(table, {"weights": module.words["weights"]}) if table else self._codes(path)
        with _naming(path):
            target: Grid = module.lower_output(codes, self._bias(path), source)
        self.grids[path] = target
        return target

    def _add_table(self, shell: nn.Module, descriptions: Mapping[str, Any]) -> None:
        path = f"{self.layout.base}embeddings"
        holder = shell
        for name in path.split(".")[:-1]:
            holder.add_module(name, nn.Module())
            holder = cast(nn.Module, getattr(holder, name))
        holder.add_module("embeddings", nn.Module())
        install(shell, {path: descriptions[path]}, dtype=torch.float32)
        table: Any = shell.get_submodule(self.layout.anatomy.word_table)
        table.weight = self._table(self.layout.anatomy.word_table, table.description()).codes


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """What goes wrong inside is said with the module's path."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _function(act: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A model's activation, by the name in its config."""
    from transformers.activations import ACT2FN

    function: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[act]
    return function
