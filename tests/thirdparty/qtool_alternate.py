"""A method for qtool: ZeroQuant that leaves every n-th block in float."""

from dataclasses import replace
from typing import Any

from pydantic import Field

from qtool.anatomy import Anatomy
from qtool.methods.base import Plan
from qtool.methods.zeroquant import ZeroQuant, ZeroQuantOptions


class AlternateOptions(ZeroQuantOptions):
    """ZeroQuant's own options, and one more."""

    every: int = Field(2, ge=1, description="Which blocks stay in float: every second, third, …")


class Alternate(ZeroQuant):
    """Only the plan differs: what is in it is lowered as ZeroQuant does it."""

    name = "alternate"
    phase = "lower"
    summary = "ZeroQuant W8A8 that leaves every n-th block in float"
    execution = "real: int8 × int8 → int32 products, float in between"
    preset = "zeroquant-w8a8"
    options_class = AlternateOptions
    options: AlternateOptions

    def plan(self, anatomy: Anatomy, model: Any) -> Plan:
        whole = super().plan(anatomy, model)
        spared = anatomy.blocks[self.options.every - 1 :: self.options.every]
        left = {path: "in a spared block" for path in whole.modules if any(block.owns(path) for block in spared)}
        modules = {path: module for path, module in whole.modules.items() if path not in left}
        return replace(whole, modules=modules, kept_float={**whole.kept_float, **left})
