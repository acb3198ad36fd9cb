"""Attention probabilities pruned and kept as codes of a few bits (Ji et al., Findings of ACL 2021), without retraining.

Every weight stays as it is. Each attention module gets a codebook a head: what is below its first edge is zero, and
every other code stands for one level. The paper's bins are equally wide in the logarithm, the same for all heads; by
default they are chosen for each head by what it does on calibration data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from qtool.anatomy import Anatomy, Unit, max_tokens
from qtool.calibrate.probabilities import Distribution
from qtool.calibrate.statistics import Statistics
from qtool.errors import InputError
from qtool.hf import attention_sites
from qtool.lesson import Lesson
from qtool.methods.base import Method, Options, Plan
from qtool.methods.logattn.codebooks import Wish, common_threshold, make
from qtool.nn import CodedAttention, QModule
from qtool.nn.attention import CHILD
from qtool.nn.codes import CODES_CHILD
from qtool.nn.integer.block import IntBlock
from qtool.numerics.codebook import MAX_BITS, THRESHOLD, Codebook
from qtool.pruning import is_headless
from qtool.recipe import Recipe
from qtool.stream import Reader

_KIND = "attention_codes"
_TOKENS = 16_384  # of the longest text, for models without a table of positions
Share = Annotated[float, Field(gt=0, lt=1)]


class LogAttnOptions(Options):
    """How probabilities become codes. `threshold`, `sparsity` and `lost_mass` are three ways to say what is pruned."""

    bits: Annotated[int, Field(ge=2, le=MAX_BITS)] | None = Field(3, description="Of a code; null: only prune")
    mapping: Literal["optimal", "log", "linear"] = Field(
        "optimal", description="Bins: with the least squared error on calibration data, or equally wide"
    )
    levels: Literal["mean", "midpoint"] = Field(
        "mean", description="What a code stands for: calibrated, or the paper's"
    )
    relative: bool = Field(True, description="Whether thresholds and bins are shares of a row's largest probability")
    pruned: bool = Field(True, description="Whether bins begin at a threshold; false: the paper's other forms")
    threshold: Share | None = Field(None, description="What is below is zero, in every head")
    sparsity: Share | None = Field(None, description="Zeros on calibration data, by one threshold for all heads")
    lost_mass: Share | None = Field(None, description="Mean mass of a row that is pruned in each head")
    renormalize: bool = Field(True, description="Whether rows add up to one again")

    @model_validator(mode="after")
    def _makes_sense(self) -> "LogAttnOptions":
        limits = [name for name in ("threshold", "sparsity", "lost_mass") if getattr(self, name) is not None]
        if len(limits) > 1:
            raise ValueError(f"{' and '.join(limits)} say the same thing in different ways; give one")
        if not self.pruned and (limits or self.bits is None or self.calibrated_levels):
            what = limits[0] if limits else "bits" if self.bits is None else "mapping and levels"
            raise ValueError(f"pruned false is the paper's form over the whole range; it cannot have {what} as given")
        if self.bits is None and not limits:
            raise ValueError("bits null only prunes; say how much by threshold, sparsity or lost_mass")
        if self.bits is not None and self.mapping == "optimal" and self.levels == "midpoint":
            raise ValueError("levels midpoint is for mapping log or linear; optimal bins have means")
        return self

    @property
    def calibrated_levels(self) -> bool:
        """Whether levels, or bins too, come from calibration data."""
        return self.bits is not None and (self.mapping == "optimal" or self.levels == "mean")

    @property
    def calibrates(self) -> bool:
        """Whether anything does."""
        return self.calibrated_levels or self.sparsity is not None or self.lost_mass is not None

    def wish(self) -> Wish:
        """As codebooks are made from."""
        fallback = None if self.mapping == "optimal" else THRESHOLD
        threshold = fallback if self.threshold is None else self.threshold
        return Wish(self.bits, self.mapping, self.calibrated_levels, threshold if self.pruned else None)


class LogAttn(Method):
    """See the module."""

    name = "logattn"
    phase = "attach"
    options_class = LogAttnOptions
    options: LogAttnOptions

    def __init__(self, recipe: Recipe, options: Options) -> None:
        super().__init__(recipe, options)
        self._wish = self.options.wish()
        bits = self.options.bits
        self.arithmetic = f"{_named(bits)}, float products"
        self._words = "pruned" if bits is None else f"{bits}-bit codes"
        self._sites: dict[str, str] = {}  # attention, and where its codes would lie
        self._joined: dict[str, str] = {}  # attention, and the module of another method that computes it

    def rule_paths(self, model: Any) -> Sequence[str]:
        """What rules call the codes of each attention, whichever module holds them."""
        return [f"{site.path}.{CODES_CHILD}" for site in attention_sites(model)]

    def plan(self, anatomy: Anatomy, model: Any) -> Plan:
        """Raises InputError naming the architecture where attention is out of reach."""
        described: dict[str, dict[str, Any]] = {}
        sites = attention_sites(model)
        for unit in anatomy.blocks:
            own = [site for site in sites if unit.owns(site.path)]
            if not own and not is_headless(model, unit):
                raise InputError(f"{anatomy.architecture}: {unit.name} has no attention that logattn could reach")
            for site in own:
                described[f"{site.path}.{CODES_CHILD}"] = {
                    "type": _KIND, "heads": site.heads, "bits": self.options.bits, "activations": self._words,
                    "relative": self.options.relative, "renormalize": self.options.renormalize,
                }  # fmt: skip
        if {other.name for other in self.recipe.methods} <= {"logattn", "headprune"}:  # who lowers knows more paths
            self.recipe.check_rules(list(described), {"weights": described, "activations": described})
        modules = {path: one for path, one in described.items() if not self.recipe.rule_for(path).keep_float}
        self._sites = {path.removesuffix(f".{CODES_CHILD}"): path for path in modules}
        self._joined, self._tokens = {}, max_tokens(model.config) or _TOKENS
        kept = {path: "asked for by a rule" for path in described if path not in modules}
        for path, module in model.named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                kept[path] = "logattn changes no weights"
        return Plan(modules, kept)

    def amend(self, plan: Plan) -> Plan:
        """Attention that another method computes takes the codes: that of an integer block, and INT8 products."""
        modules = dict(plan.modules)
        for site, path in self._sites.items():
            outer = next((outer for outer, one in modules.items() if _attends(outer, one, site)), None)
            if outer is not None:
                modules[outer] = self._coded(modules[outer])
                self._joined[site] = outer
                del modules[path]
        if len(self._joined) == len(self._sites):
            self.arithmetic = _named(self.options.bits) if self._sites else ""
        return replace(plan, modules=modules)

    def _coded(self, description: Mapping[str, Any]) -> Mapping[str, Any]:
        """The description of what attends, with codes for probabilities."""
        words = {name: getattr(self.options, name) for name in ("relative", "renormalize")}
        words = {**words, "code_bits": self.options.bits}
        if "parts" not in description:
            return {**description, **words, "type": "coded_attention", "tokens": self._tokens}
        words = {**words, "type": "int_coded_attention", "activations": self._words}
        attention = {**description["parts"]["attention"], **words}
        return {**description, "parts": {**description["parts"], "attention": attention}}

    @property
    def _observer(self) -> str:
        return "attention-shares" if self.options.relative else "attention-histogram"

    def observers(self, unit: Unit, plan: Plan) -> dict[str, str]:
        """Of the probabilities of every attention in the unit, where anything is calibrated."""
        sites = self._owned(unit) if self.options.calibrates else []
        return {f"{site}:probabilities": self._observer for site in sites}

    def resolve(self, plan: Plan, statistics: Statistics | None) -> None:
        """The threshold of all heads, for zeros all over the model."""
        if self.options.sparsity is not None:
            seen = [self._seen(site, statistics) for site in self._sites]
            threshold = common_threshold([one for one in seen if one is not None], self.options.sparsity)
            self._wish = replace(self._wish, threshold=threshold)

    def lower(
        self, unit: Unit, plan: Plan, weights: Reader, statistics: Statistics | None, lesson: Lesson | None = None
    ) -> dict[str, QModule]:
        """A codebook for each attention that stays in float."""
        lowered: dict[str, QModule] = {}
        for site in self._owned(unit):
            path = self._sites[site]
            if site not in self._joined:
                module = CodedAttention.from_description(torch.nn.Module(), path, plan.modules[path], device="meta")
                module.fill(self._book(site, path, statistics))
                lowered[path] = module
        return lowered

    def attach(self, unit: Unit, plan: Plan, lowered: Mapping[str, QModule], statistics: Statistics | None) -> None:
        """A codebook for each attention of other methods."""
        for site in self._owned(unit):
            if outer := self._joined.get(site):
                module: Any = lowered[outer]
                attention = module.part("attention") if isinstance(module, IntBlock) else module
                attention.fill(self._book(site, site, statistics))

    def _book(self, site: str, path: str, statistics: Statistics | None) -> Codebook:
        """Of the heads of an attention; what calibration saw is reported for `path`."""
        seen = self._seen(site, statistics)
        book = make(self._wish, seen, self.options.lost_mass)
        if seen is not None:
            self._report[path] = figures(seen, book.edges[..., 0].expand(len(seen.counts)))
        return book

    def _seen(self, site: str, statistics: Statistics | None) -> Distribution | None:
        if not self.options.calibrates:
            return None
        assert statistics is not None  # `observers` asked for them
        return Distribution.from_state(statistics.state(f"{site}:probabilities", self._observer))

    def _owned(self, unit: Unit) -> list[str]:
        return [site for site in self._sites if unit.owns(site)]


def _named(bits: int | None) -> str:
    return "pruned attention probabilities" if bits is None else f"attention probabilities in codes of {bits} bits"


def _attends(path: str, description: Mapping[str, Any], site: str) -> bool:
    """Whether the module described computes the attention at `site`."""
    if description["type"] == "int_block":
        return site.startswith(f"{path}.")
    return bool(description["type"] == "attention" and path == f"{site}.{CHILD}")


def figures(seen: Distribution, first: torch.Tensor) -> dict[str, float]:
    """On calibration data: percent of zeros, of mass that they had, and how many keys a query saw on average.

    `first` float64 `[heads]` is where code 1 begins.
    """
    zeros = float((seen.sparsity(first) * seen.counts.sum(-1)).sum() / seen.counts.sum())
    return {
        "zeros_percent": round(100 * zeros, 2),
        "lost_mass_percent": round(100 * float(seen.lost_mass(first).mean()), 3),
        "mean_keys": round(seen.mean_length, 1),
    }
