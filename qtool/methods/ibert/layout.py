"""Which integer modules a model becomes, from shapes alone: descriptions of `qtool.nn` by path."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from qtool.anatomy import FAMILIES, POOLER, Anatomy, HeadModule, Unit, max_tokens, position_padding
from qtool.errors import InputError
from qtool.methods.base import Options
from qtool.numerics import QuantSpec
from qtool.recipe import Recipe, Spec
from qtool.rounding import ROUNDINGS

QUERY_BITS = CONTEXT_BITS = ACT_BITS = 16
TANH_IN_BITS = 20
TANH_PLACES = 15
HEAD_BITS, LOGIT_BITS = 24, 31
HIDDEN_BITS = 30
"""Width of what leaves the last block: users standardise it, and a channel may be nearly constant."""
ACTIVATIONS = ("gelu", "relu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "silu", "swish", "quick_gelu", "mish")
LINEARS = ("linear", "hidden", "output")
Description = dict[str, Any]


class IBertOptions(Options):
    """What docs/ibert.md measures; the defaults are the best that were found."""

    residual_bits: int = Field(22, ge=8, le=23, description="Width of the residual stream")
    gelu: Literal["table", "polynomial"] = Field("table", description="An exact table, or the paper's polynomial")
    gelu_bits: int = Field(12, ge=8, le=14, description="Width of the input of the blocks' activation")
    shifted_gelu: bool = Field(True, description="Shift the activation's output to start at zero: a bit more for it")
    probability_bits: int = Field(14, ge=8, le=16, description="Width of attention probabilities")
    scores_grid: int = Field(10, ge=6, le=12, description="Attention scores are in units of ln2 / 2^scores_grid")
    attention_scales: Literal["channel", "head", "tensor"] = Field(
        "channel", description="What of K and V shares a scale"
    )
    smoothing: float | None = Field(0.5, ge=0, le=1, description="Exponent of migration into weights; null: none")
    tuning: int = Field(0, ge=0, description="Steps in which the smoothing is tuned on a sample of activations")
    centering: bool = Field(True, description="Take channels' means out of what is rounded to INT8")
    clipping: Literal["max", "percentile", "mse", "token"] = Field(
        "max", description="How static INT8 ranges are found"
    )
    percentile: float = Field(
        99.99, gt=50, le=100, description="Of magnitudes, where clipping is by percentile or token"
    )
    bias_correction: Literal["none", "float", "quantized"] = Field(
        "float", description="Take out the mean error that rounding makes: of weights alone, or on quantized inputs"
    )
    word_embeddings: Spec = QuantSpec.parse("int8:channel:sym")
    small_embeddings: Spec = QuantSpec.parse("int16:channel:sym")


@dataclass(frozen=True)
class Layer:
    """A layer of the pooler or head: its kind (`HeadModule`), full path, the module that it is in, and what follows."""

    kind: str
    path: str
    module: HeadModule
    follows: str


class Layout:
    """The integer form of one model under one recipe."""

    def __init__(
        self, anatomy: Anatomy, model: Any, recipe: Recipe, options: IBertOptions, other_paths: Sequence[str] = ()
    ) -> None:
        """`other_paths` are those that rules may name too. Raises InputError for a model that has no integer form."""
        config = model.config
        family = FAMILIES.get(config.model_type)
        if family is None or not family.norms:
            known = ", ".join(name for name, family in FAMILIES.items() if family.norms)
            raise InputError(f"ibert has no integer form of model type '{config.model_type}'; it has one of {known}")
        self.act: str = getattr(config, "hidden_act", None) or config.activation
        if self.act not in ACTIVATIONS:
            raise InputError(
                f"ibert has no integer form of activation '{self.act}'; it has of {', '.join(ACTIVATIONS)}"
            )
        if getattr(config, "position_embedding_type", "absolute") not in ("absolute", None):
            raise InputError(f"ibert has no integer form of {config.position_embedding_type} positions")
        if self.act != "gelu" and options.gelu == "polynomial":
            raise InputError(f"methods.ibert.gelu: the polynomial is gelu's, and this model's activation is {self.act}")
        if recipe.weights.rounding not in ROUNDINGS:
            raise InputError(
                f"weights.rounding: {recipe.weights.rounding} is for zeroquant; ibert takes {', '.join(ROUNDINGS)}"
            )
        if recipe.weights.scale_rule != "absmax":
            raise InputError(f"weights.scale_rule: {recipe.weights.scale_rule} is for zeroquant; ibert takes absmax")
        whole = recipe.activations.spec
        if options.clipping == "token" and (whole == "float" or whole.dynamic or options.smoothing is not None):
            raise InputError("methods.ibert.clipping: token is for static activations, with smoothing set to null")
        if options.tuning and options.smoothing is None:
            raise InputError("methods.ibert.tuning: it tunes the smoothing, which is null")
        self.anatomy, self.model, self.recipe, self.options, self.family = anatomy, model, recipe, options, family
        self.base = "" if model.base_model is model else f"{model.base_model_prefix}."
        self.hidden, self.size = config.hidden_size, config.hidden_size // config.num_attention_heads
        linears = [layer.path for layer in self.head_layers() if layer.kind in LINEARS]
        paths = [part.path for _, part in anatomy.parts()]
        recipe.check_rules([*paths, *linears, *other_paths], {"weights": other_paths, "activations": other_paths})

    def modules(self) -> dict[str, Description]:
        """Descriptions of everything that is replaced, by path."""
        found: dict[str, Description] = {f"{self.base}embeddings": self._embeddings()}
        if self.projection is not None:
            found[self.projection] = self._linear(self.projection, rescales=False)
        for unit in self.anatomy.blocks:
            found[unit.modules[0]] = self._block(unit)
        for module, layers in self._by_module():
            found[module.path] = self._head(module, layers)
        return found

    @property
    def projection(self) -> str | None:
        """The path of ELECTRA's projection behind the embeddings, if the model has one."""
        return f"{self.base}embeddings_project" if hasattr(self.model.base_model, "embeddings_project") else None

    @property
    def embedding_norm(self) -> str:
        """The path of the LayerNorm behind the tables."""
        return f"{self.base}{self.family.norms['embeddings']}"

    def head_layers(self) -> list[Layer]:
        """Pooler and head as one sequence."""
        pooler = getattr(self.model.base_model, "pooler", None)
        path = f"{self.base}{POOLER.path}"
        modules = [HeadModule(path, POOLER.layers, first=True)] if pooler is not None else []
        modules += self.family.heads[self.anatomy.head_kind]
        flat = [
            (kind, f"{module.path}.{inside}".rstrip("."), module)
            for module in modules
            for kind, inside in module.layers
        ]
        kinds = [kind for kind, _, _ in flat]
        return [Layer(*layer, follows) for layer, follows in zip(flat, [*kinds[1:], ""], strict=False)]

    def starts_pooled(self) -> bool:
        """Whether the head reads the pooler's output, not the hidden states."""
        return self.anatomy.head_kind in self.family.pooled

    def block_paths(self, unit: Unit) -> dict[str, str]:
        """Full paths by role of `IntBlock`."""
        names = {part.name: part.path for part in unit.parts}
        if "attention.query" not in names:
            raise InputError(f"ibert has no integer form of {unit.name}, which lost all of its heads; keep one of them")
        block, norms = unit.modules[0], self.family.norms
        return {
            "query": names["attention.query"],
            "key": names["attention.key"],
            "value": names["attention.value"],
            "attention": names["attention.query"].rpartition(".")[0],
            "output": names["attention.output"],
            "attention_norm": f"{block}.{norms['attention']}",
            "up": names["ffn.up"],
            "act": f"{block}.act",
            "down": names["ffn.down"],
            "ffn_norm": f"{block}.{norms['ffn']}",
        }

    def observers(self, unit: Unit) -> dict[str, str]:
        """What is watched in pass 1: `path` is a module's input, `path:output` what leaves it."""
        if unit.kind == "embeddings":
            return {}
        if unit.kind == "head":
            return {f"{at.path}:output": "minmax" for at in self.head_layers() if at.follows in ("act", "gelu")}
        paths = self.block_paths(unit)
        static = "channels" if self.options.clipping in ("max", "token") else "histogram"
        inputs = {role: "channels" if self._activations(paths[role]).dynamic else static for role in INPUTS}
        sites = {paths[role]: observer for role, observer in inputs.items()}
        if self.options.clipping == "token":
            sites |= {
                f"{paths[role]}:peaks": "token-peaks" for role in INPUTS if not self._activations(paths[role]).dynamic
            }
        if self.options.tuning and self.options.smoothing is not None:
            sites |= {f"{paths[role]}:sample": "sample" for role in INPUTS}
        sites |= {f"{paths[role]}:output": static for role in ("key", "value")}
        sites |= {f"{paths['query']}:output": "channels", f"{paths['up']}:output": "minmax"}
        return sites | {paths[role]: "minmax" for role in ("attention_norm", "ffn_norm")}

    def dynamic(self, path: str) -> bool:
        """Whether INT8 codes of the input of the linear at `path` are made token by token."""
        return self._activations(path).dynamic

    def shifts(self, path: str) -> bool:
        """Whether what enters the linear at `path`, from the block's activation, starts at zero."""
        return self._activations(path).dynamic and (self.options.shifted_gelu or self.act == "relu")

    def tabled(self, act: str) -> bool:
        """Whether an activation is a table."""
        return act not in ("relu", "gelu") or (act == "gelu" and self.options.gelu == "table")

    def _activations(self, path: str) -> QuantSpec:
        found = self.recipe.rule_for(path).activations or self.recipe.activations.spec
        if found == "float":
            raise InputError(f"{path}: {_NOTHING_FLOAT}")
        return found

    def _embeddings(self) -> Description:
        parts: dict[str, Description] = {}
        for name, inside in self.family.tables.items():
            path = f"{self.base}{inside}"
            spec = self.table_spec(name)
            shape = list(self.model.get_submodule(path).weight.shape)
            parts[name] = {"path": _inside(path, f"{self.base}embeddings"), "type": "int_rows"}
            parts[name] |= {"shape": shape, "weights": str(spec)}
        norm = {"path": _inside(self.embedding_norm, f"{self.base}embeddings")}
        parts["norm"] = norm | self._norm(parts["word"]["shape"][1], HEAD_BITS)
        return {"type": "int_embeddings", "parts": parts, "padding_idx": position_padding(self.model.config)}

    def table_spec(self, name: str) -> QuantSpec:
        """How an embedding table is stored. Raises InputError for what cannot be."""
        path = f"{self.base}{self.family.tables[name]}"
        rule = self.recipe.rule_for(path)
        if rule.keep_float:
            raise InputError(f"{path}: {_NOTHING_FLOAT}")
        spec = rule.weights or (self.options.word_embeddings if name == "word" else self.options.small_embeddings)
        if spec.dynamic or not spec.symmetric or not 5 <= spec.num_bits <= 16 or spec.block not in _WHOLE_ROWS:
            raise InputError(f"{path}: a table takes static symmetric int5 to int16, by row or tensor, not {spec}")
        if name == "word" and self.anatomy.tied_head and spec.num_bits > 8:
            raise InputError(f"{path}: {self.anatomy.tied_head} multiplies by this table, so it takes int5 to int8")
        return spec

    def _block(self, unit: Unit) -> Description:
        paths, wide = self.block_paths(unit), self.options.residual_bits
        if len({self._activations(paths[role]) for role in ("query", "key", "value")}) > 1:
            raise InputError(
                f"{paths['query']}: query, key and value share one input; give their rules one spec for it"
            )
        inner = ACT_BITS if self.act == "relu" else self.options.gelu_bits
        parts = {
            "query": self._linear(paths["query"], out_bits=QUERY_BITS),
            "key": self._linear(paths["key"], out_bits=8, rescales=False),
            "value": self._linear(paths["value"], out_bits=8, rescales=False),
            "attention": self._attention(paths["query"]),
            "output": self._linear(paths["output"], in_bits=CONTEXT_BITS, rescales=not self.dynamic(paths["output"])),
            "attention_norm": self._norm(self.hidden, wide + 1),
            "up": self._linear(paths["up"], out_bits=inner),
            "act": self._activation(self.act, shifted=self.shifts(paths["down"])),
            "down": self._linear(paths["down"], in_bits=ACT_BITS, unsigned=self.shifts(paths["down"])),
            "ffn_norm": self._norm(self.hidden, wide + 1),
        }
        if unit is self.anatomy.blocks[-1]:
            parts["ffn_norm"]["out_bits"] = HIDDEN_BITS
        block = unit.modules[0]
        return {
            "type": "int_block",
            "parts": {role: {"path": _inside(paths[role], block), **part} for role, part in parts.items()},
        }

    def _attention(self, query: str) -> Description:
        tokens, width = max_tokens(self.model.config), self.model.get_submodule(query).weight.shape[0]
        return {
            "type": "int_attention", "heads": width // self.size, "hidden": width, "tokens": tokens,
            "query_bits": QUERY_BITS, "probability_bits": self.options.probability_bits,
            "grid": self.options.scores_grid, "out_bits": CONTEXT_BITS,
        }  # fmt: skip

    def _by_module(self) -> Iterator[tuple[HeadModule, list[Layer]]]:
        layers = self.head_layers()
        for module in dict.fromkeys(layer.module for layer in layers):
            yield module, [layer for layer in layers if layer.module is module]

    def _head(self, module: HeadModule, layers: Sequence[Layer]) -> Description:
        parts: dict[str, Description] = {}
        for layer in layers:
            role = layer.kind if layer.kind not in parts else f"{layer.kind}_{len(parts)}"
            parts[role] = {"path": _inside(layer.path, module.path), **self._head_layer(layer)}
        if [layer.path for layer in layers] == [module.path]:
            return {key: value for key, value in parts[layers[0].kind].items() if key != "path"}
        return {"type": "int_chain", "parts": parts, "order": list(parts), "first": module.first}

    def _head_layer(self, layer: Layer) -> Description:
        if layer.kind == "norm":
            return self._norm(self.model.get_submodule(layer.path).weight.shape[0], ACT_BITS + 1)
        if layer.kind == "tanh":
            return {"type": "int_tanh", "grid": self.options.scores_grid}
        if layer.kind in ("act", "gelu"):
            return self._activation(self.act if layer.kind == "act" else "gelu", shifted=False)
        widths = {"act": self.options.gelu_bits, "gelu": self.options.gelu_bits, "tanh": TANH_IN_BITS}
        out = LOGIT_BITS if layer.kind == "output" else widths.get(layer.follows, HEAD_BITS)
        return self._linear(
            layer.path, in_bits=self._head_input(layer), out_bits=out, output=layer.kind == "output", rescales=False
        )

    def _head_input(self, layer: Layer) -> int:
        """The width of what enters a linear of the head."""
        layers = self.head_layers()
        before = layers[layers.index(layer) - 1] if layers.index(layer) else None
        pooler = before is not None and before.kind == "tanh" and before.module is not layer.module
        if before is None or (pooler and not self.starts_pooled()):
            return HIDDEN_BITS
        if before.kind == "norm":
            return self.options.residual_bits
        return HEAD_BITS if before.kind == "hidden" else ACT_BITS

    def _linear(
        self,
        path: str,
        *,
        in_bits: int | None = None,
        out_bits: int | None = None,
        rescales: bool | None = None,
        unsigned: bool = False,
        output: bool = False,
    ) -> Description:
        """A product; its widths default to those of the residual stream. Raises InputError for what cannot run."""
        rule, wide = self.recipe.rule_for(path), self.options.residual_bits
        if rule.keep_float:
            raise InputError(f"{path}: {_NOTHING_FLOAT}")
        tied = path == self.anatomy.tied_head
        weights = self.table_spec("word") if tied else rule.weights or self.recipe.weights.spec
        activations = self._activations(path)
        if not any(unit.owns(path) for unit in self.anatomy.blocks):  # no range of its input was observed
            if isinstance(rule.activations, QuantSpec) and not rule.activations.dynamic:
                raise InputError(f"{path}: outside the blocks activations are quantized token by token")
            activations = QuantSpec.parse("int8:token:sym")
        _check_linear(weights, activations, path)
        smooths = self.options.smoothing is not None or self.options.centering or not activations.dynamic
        return {
            "type": "int_tied_linear" if tied else "int_linear",
            "shape": list(self.model.get_submodule(path).weight.shape),
            "weights": str(weights),
            "activations": str(activations),
            "in_bits": in_bits or wide,
            "out_bits": out_bits or wide,
            "rescales": smooths if rescales is None else rescales,
            "unsigned": unsigned,
            "output": output,
            **({"table": self.anatomy.word_table} if tied else {}),
        }

    def _norm(self, size: int, in_bits: int) -> Description:
        return {"type": "int_norm", "size": size, "in_bits": in_bits, "out_bits": self.options.residual_bits}

    def _activation(self, act: str, *, shifted: bool) -> Description:
        if self.tabled(act):
            return {"type": "int_table", "in_bits": self.options.gelu_bits}
        if act == "relu":
            return {"type": "int_relu"}
        return {"type": "int_gelu", "in_bits": self.options.gelu_bits, "shifted": shifted}


INPUTS = ("query", "output", "up", "down")
"""Roles of a block whose inputs are rounded to INT8; key and value read what the query reads."""
_WHOLE_ROWS = ((1, None), (None, None))
_NOTHING_FLOAT = "ibert leaves nothing in float; take the rule out, or use zeroquant"


def _inside(path: str, module: str) -> str:
    return path.removeprefix(module).removeprefix(".")


def _check_linear(weights: QuantSpec, activations: QuantSpec, path: str) -> None:
    if weights.dynamic or not weights.symmetric or not 5 <= weights.num_bits <= 8 or weights.block not in _WHOLE_ROWS:
        raise InputError(
            f"{path}: weights {weights} cannot run; ibert takes static symmetric int5 to int8, by channel or tensor"
        )
    token_wise = activations.dynamic and activations.block == (1, None)
    tensor_wise = not activations.dynamic and activations.block == (None, None)
    if activations.num_bits != 8 or not activations.symmetric or not (token_wise or tensor_wise):
        raise InputError(f"{path}: activations {activations} cannot run; use int8:token:sym or int8:tensor:sym")
