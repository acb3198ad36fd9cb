"""`qtool demo`: every method on a real model, against float, in one table."""

from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool import api, console, recipe
from qtool.artifact import report
from qtool.console import Screen
from qtool.demo.model import float_model
from qtool.errors import InputError
from qtool.evaluation import runner, tasks

if TYPE_CHECKING:
    from qtool.evaluation.result import Evaluation, Score

_NOTE = (
    "Accuracy on {n} synthetic sentences that ship with qtool (not a benchmark); latency is the mean over batches of "
    "{batch} sentences."
)


@dataclass
class Table:
    """What the demo measured, a row a preset."""

    evaluations: dict[str, "Evaluation"] = field(default_factory=dict)
    execution: dict[str, str] = field(default_factory=dict)

    def render(self, screen: Screen) -> None:
        """On stdout."""
        columns = ["", "accuracy %", "drop", "95 % interval", "agreement %", "size", "ms/sentence", "kernels"]
        first = next(iter(self.evaluations.values()))
        assert first.baseline is not None
        rows = [["float32", f"{first.baseline.value:.2f}", "-", "-", "-", *_cost(first.baseline, first.n), "float"]]
        for name, result in self.evaluations.items():
            assert result.drop is not None and result.interval is not None and result.agreement is not None
            low, high = result.interval
            against_float = [f"{result.drop:+.2f}", f"[{low:+.2f}, {high:+.2f}]", f"{result.agreement:.2f}"]
            cost = _cost(result.candidate, result.n)
            rows.append([name, f"{result.candidate.value:.2f}", *against_float, *cost, self.execution[name]])
        screen.table("qtool demo: all-MiniLM-L6-v2, fine-tuned for sentiment", columns, rows)
        screen.line(_NOTE.format(n=first.n, batch=first.settings["batch_size"]))

    def to_json(self) -> dict[str, Any]:
        """Every evaluation by the name of its preset."""
        results = {name: {**e.to_json(), "execution": self.execution[name]} for name, e in self.evaluations.items()}
        return {"schema_version": 1, "results": results}


def _cost(score: "Score", sentences: int) -> list[str]:
    """Size and milliseconds a sentence."""
    return [console.megabytes(score.size_bytes), f"{1000 * score.seconds / sentences:.2f}"]


def show(out: Path, threads: int | None, screen: Screen) -> Table:
    """Quantize the demo model with the presets of all methods into `out`, and evaluate each. Raises InputError."""
    if out.exists() and any(out.iterdir()) and not (out / "float").is_dir():
        raise InputError(f"{out} is in use by something else; choose another -o")
    source = float_model(out / "float", screen.note)
    table = Table()
    for name in recipe.presets():
        wanted = api.resolve_recipe(config=name, flags={"threads": threads} if threads else {})
        target = out / name
        _quantize(str(source), wanted, target, screen)
        with resources.as_file(resources.files("qtool.demo") / "sentences.jsonl") as data:
            table.evaluations[name] = runner.evaluate(
                target, tasks.task("sst2"), data=data, baseline=source, threads=threads,
                progress=lambda stage, done, total: screen.step(stage, "", done, total),
            )  # fmt: skip
        screen.close()
        table.execution[name] = f"real: {report(target)['execution']['arithmetic']}"
    return table


def _quantize(source: str, wanted: recipe.Recipe, target: Path, screen: Screen) -> None:
    for event in api.quantize_events(source, wanted, target, overwrite=True):
        console.render_event(screen, event)
    screen.close()
