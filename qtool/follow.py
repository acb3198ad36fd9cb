"""Pass 2's second half: calibration data through the float model and the lowered one, side by side.

What a unit computes from what the lowered units before it made is compared with the float model, site by site (a site
is a module that both models have): the mean error corrects biases, the rest becomes the figures that `qtool inspect`
shows. Hidden states of these batches are kept, twice.
"""

from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from qtool.anatomy import Anatomy, Unit
from qtool.kernels import using
from qtool.kernels.reference import SaturationMeter, counting_saturation
from qtool.lesson import Example, Lesson
from qtool.methods.base import decibels
from qtool.nn import IntModule
from qtool.nn.integer.module import integer_outputs
from qtool.numerics.grid import Grid
from qtool.stream import Batch, Call, Stream, give_back

Flow = MutableSequence[tuple[torch.Tensor, tuple[Call, ...]]]


@dataclass
class _Loss:
    """Sums over the tokens of one site: signal, noise, and the error of each channel."""

    signal: float = 0.0
    noise: float = 0.0
    error: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    tokens: int = 0

    def add(self, exact: torch.Tensor, found: torch.Tensor) -> None:
        """Rows `[tokens, channels]` of both models, on their device."""
        off = exact - found
        self.signal += exact.square().sum().item()
        self.noise += off.square().sum().item()
        self.error = self.error + off.sum(0).cpu()
        self.tokens += len(exact)


class Follower:
    """Two streams that see the same batches; only the float one where `lowered` is None: nobody looks at the other."""

    def __init__(
        self, exact: Stream, lowered: Stream | None, batches: Sequence[Batch], keep: Callable[[], Flow] = list
    ) -> None:
        """`keep` makes the lists of hidden states, which may lie on disk."""
        self.exact, self.lowered, self.batches = exact, lowered, batches
        self._streams = [exact] if lowered is None else [exact, lowered]
        self._flows: dict[Stream, Flow] = {stream: keep() for stream in self._streams}
        self._passed: set[str] = set()
        self._keep = keep

    def passed(self, unit: Unit) -> bool:
        """Whether both models are behind a unit. Behind the head is nothing to go to."""
        return unit.kind == "head" or unit.name in self._passed

    @contextmanager
    def lesson(self, unit: Unit) -> Iterator[Lesson]:
        """The float block that comes next, loaded, with what enters it in both models.

        Without a lowered one, what enters the float model stands for both.
        """
        index = self._blocks(self.exact.anatomy).index(unit.name)
        flows = [self._flows[self._streams[end]] for end in (0, -1)]
        examples = [
            Example(exact, lowered, calls[index], batch["attention_mask"].bool())
            for (exact, calls), (lowered, _), batch in zip(*flows, self.batches, strict=True)
        ]
        with self.exact.loaded(unit):
            yield Lesson(self.exact, unit, examples, self._keep)

    def corrections(self, unit: Unit, sites: Sequence[str], grids: Mapping[str, Grid]) -> dict[str, torch.Tensor]:
        """How much larger float's outputs are on average, `[channels]` by site. The lowered unit is loaded."""
        with self.exact.loaded(unit):
            losses = self._compare(unit, {site: grids[site] for site in sites}, advance=False)
        return {site: loss.error / loss.tokens for site, loss in losses.items()}

    def measure(self, unit: Unit, grids: Mapping[str, Grid]) -> dict[str, dict[str, float]]:
        """Signal to noise in dB and the percentage of saturated values by site; both models go on to the next unit.

        The lowered unit is loaded.
        """
        meter = SaturationMeter()
        with ExitStack() as stack:
            stack.enter_context(self.exact.loaded(unit))
            stack.enter_context(using("reference"))  # the one that counts
            stack.enter_context(counting_saturation(meter))
            stack.enter_context(self._naming(unit, meter))
            sites = {site: grid for site, grid in grids.items() if unit.owns(site)}
            losses = self._compare(unit, sites, advance=True, meter=meter)
        figures: dict[str, dict[str, float]] = {
            site: {"sqnr_db": decibels(loss.signal, loss.noise)} for site, loss in losses.items()
        }
        for site, (clipped, values) in meter.counts.items():
            if not site:  # the embeddings, run again below a head
                continue
            figures.setdefault(site, {})["saturated_percent"] = 100 * clipped / values if values else 0.0
        return figures

    def advance(self, unit: Unit) -> None:
        """All models go on to the next unit. The lowered unit, if there is one, is loaded."""
        with self.exact.loaded(unit):
            self._compare(unit, {}, advance=True)

    def _compare(
        self, unit: Unit, grids: Mapping[str, Grid], *, advance: bool, meter: SaturationMeter | None = None
    ) -> dict[str, _Loss]:
        losses = {site: _Loss() for site in grids}
        for number, batch in enumerate(self.batches):
            seen: list[dict[str, torch.Tensor]] = []
            for stream in self._streams:
                with _outputs(stream.model, grids) as outputs, integer_outputs():
                    after = self._step(stream, unit, number, batch)
                seen.append(outputs)
                flow = self._flows[stream]
                if advance and number == len(flow):
                    flow.append(after)
                elif advance:
                    flow[number] = after
            real = batch["attention_mask"].bool().to(self.exact.device)
            if meter is not None:
                meter.end_batch(real)
            for site, loss in losses.items():
                exact, found = (_real(output[site], real.flatten()) for output in seen)
                loss.add(exact.double(), grids[site].real(found))
            give_back()
        if advance:
            self._passed.add(unit.name)
        return losses

    def _step(self, stream: Stream, unit: Unit, number: int, batch: Batch) -> tuple[torch.Tensor, tuple[Call, ...]]:
        if unit.kind == "embeddings":
            return stream.embed(batch)
        hidden, calls = self._flows[stream][number]
        if unit.kind == "head":
            stream.head(batch, hidden)
            return hidden, calls
        return stream.block(unit, hidden, calls[self._blocks(stream.anatomy).index(unit.name)]), calls

    @staticmethod
    def _blocks(anatomy: Anatomy) -> list[str]:
        return [unit.name for unit in anatomy.blocks]

    @contextmanager
    def _naming(self, unit: Unit, meter: SaturationMeter) -> Iterator[None]:
        """While active, `meter` knows which module of the unit computes."""

        def name(path: str) -> Callable[..., None]:
            return lambda *_: setattr(meter, "site", path)

        assert self.lowered is not None  # there is nothing to measure
        with ExitStack() as stack:
            for path, module in self.lowered.model.named_modules():
                if isinstance(module, IntModule) and unit.owns(path):
                    # A composite begins with the work of its first part.
                    first = next(iter(getattr(module, "parts", {"": ""}).values()))
                    site = f"{path}.{first}".rstrip(".")
                    stack.callback(module.register_forward_pre_hook(name(site)).remove)
            yield


@contextmanager
def _outputs(model: Any, sites: Mapping[str, Grid]) -> Iterator[dict[str, torch.Tensor]]:
    """Collects what leaves each site."""
    found: dict[str, torch.Tensor] = {}

    def keep(site: str) -> Callable[..., None]:
        return lambda _, __, out: found.__setitem__(site, out)

    with ExitStack() as stack:
        for site in sites:
            stack.callback(model.get_submodule(site).register_forward_hook(keep(site)).remove)
        yield found


def _real(output: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The rows of real tokens; what has one row a text has only such."""
    rows = output.flatten(0, -2)
    return rows[real] if len(rows) == len(real) else rows
