"""The page of a study of attention: from the JSON of `qtool.analysis.study` to findings, figures and tables."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any
from xml.etree.ElementTree import Element

from qtool.analysis.charts import Chart, Dot, Line, line_chart
from qtool.analysis.figures import Distribution, Heat, distribution, heat_map, spark_grid
from qtool.analysis.page import Group, Page, Section, Table, Tile
from qtool.analysis.score_charts import BITS, THRESHOLD, Series, charts, table
from qtool.analysis.svg import number, percent, power, threshold
from qtool.analysis.words import Words

Body = Mapping[str, Any]

FORMS = (
    ("log", True, "log"),
    ("linear", True, "linear"),
    ("log", False, "log, unpruned"),
    ("linear", False, "linear, unpruned"),
)

NOTES = (
    "Only pairs that exist are counted: queries of padding are left out, and keys that a query may not see, because "
    "they are padding or come later. Sparsity depends on length (the longer a row, the smaller its probabilities), so "
    "it is stated with the mean length.",
    "Pruning sets probabilities that are not above the threshold to zero. Log codes have bins that are equally wide in "
    "the logarithm, from the threshold (or, not pruned, from 10⁻¹⁰) to 1, linear ones equally wide bins; a code stands "
    "for the middle of its bin, and rows are not renormalised. This is the plain form of Ji et al., On the "
    "Distribution, Sparsity, and Inference-time Quantization of Attention Values in Transformers (ACL 2021).",
    "Every point is measured on the same batches as the float model, in the same process. Bands are 95 % confidence "
    "intervals of the difference from float, paired by example: where float's line is inside a band, no loss was "
    "shown. Dispersion is the entropy of a row by the logarithm of its length: 1 where attention is even, 0 where it "
    "goes to one token.",
)


def page_of(body: Body) -> Page:
    """The page of a study, finished or not."""
    words = Words(body)
    sections = [_where(body, words), _shape(body, words)]
    sections += [_pruning(body, words)] if words.pruning else []
    sections += [_codes(words, cut) for cut in words.cuts]
    return Page(
        kicker="Attention study",
        title=words.name,
        finding=words.finding(),
        tiles=_tiles(body, words),
        sections=sections,
        facts=_facts(body, words),
        notes=NOTES,
    )


def _tiles(body: Body, words: Words) -> list[Tile]:
    every, point = body["distribution"]["all"], words.at_mark
    remark = f"of all attention probabilities, at a mean length of {number(words.length, 0)} tokens"
    tiles = [Tile(percent(words.sparsity(every)), f"At or below {threshold(words.mark)}", remark)]
    remark = f"of {number(words.keys, 0)} that a row sees; the median. The mean is {number(every['half_mean'], 1)}"
    tiles.append(Tile(f"{every['half_median']:g}", "Tokens that carry half of a row", remark))
    if point is not None and point["agreement"] is not None:
        same = percent(point["agreement"] / 100)
        tiles.append(Tile(same, "Predictions unchanged", f"after pruning at {threshold(point['threshold'])}"))
    remark = f"{body['task']}, {number(body['n'], 0)} {body['unit']}"
    tiles.append(Tile(words.score(words.float), f"{words.metric_title} of the float model", remark))
    return tiles


def _where(body: Body, words: Words) -> Section:
    """Heat maps of layers and heads."""
    layers, limit = body["distribution"]["layers"], threshold(words.mark)
    share = Heat(
        f"Share at or below {limit}",
        f"Of each layer (row) and head (column) the share of probabilities at or below {limit}.",
        words.heads(words.sparsity), shown=lambda v: f"{100 * v:.0f}", told=lambda v: percent(v, 0), low=0.0, high=1.0,
    )  # fmt: skip
    half = Heat(
        "Tokens that carry half of a row, mean",
        "Of each layer and head how many tokens carry half of a row's mass, on average over rows.",
        words.heads(lambda head: head["half_mean"]), shown=lambda v: number(v, 1 if v < 9.95 else 0), told=number,
        low=1.0,
    )  # fmt: skip
    even = Heat(
        "Dispersion: 0 one token, 1 all alike",
        "Of each layer and head the mean entropy of a row by the logarithm of its length.",
        words.heads(lambda head: head["dispersion"]), shown=lambda v: f"{v:.1f}", told=number, low=0.0, high=1.0,
    )  # fmt: skip
    named = (("sparsity", share), ("half-mass", half), ("dispersion", even))
    return Section(
        "Layers and heads",
        words.heads_headline(),
        "A cell is a head. Strong cells on the left are heads that lose most of their probabilities to pruning; the "
        "other two maps say whether that is because they look at few tokens.",
        [Group("", "", [(name, heat_map(heat)) for name, heat in named], "triple")],
        [_head_table(layers, body["distribution"]["thresholds"])],
    )


def _head_table(layers: Sequence[Any], limits: Sequence[float]) -> Table:
    columns = ["layer", "head", *(f"≤ {threshold(limit)}" for limit in limits)]
    columns += ["half: mean", "half: median", "entropy, nats", "dispersion"]
    rows = []
    for index, layer in enumerate(layers):
        for head, item in [*enumerate(layer["heads"]), ("all", layer["all"])]:
            shares = [percent(share, 2) for share in item["sparsity"]]
            half = [number(item["half_mean"]), f"{item['half_median']:g}"]
            spread = [number(item["entropy"], 3), number(item["dispersion"], 3)]
            rows.append([str(index), str(head), *shares, *half, *spread])
    return Table("sparsity, half of the mass and dispersion of every head", columns, rows, 2)


def _shape(body: Body, words: Words) -> Section:
    """A panel a layer; under a fold a small histogram a head."""
    found = body["distribution"]
    layers = found["layers"]
    top = max(count / layer["all"]["pairs"] for layer in layers for count in layer["all"]["counts"])
    panels = [_panel(found["edges"], index, layer, top, words) for index, layer in enumerate(layers)]
    grid = spark_grid(
        "Histogram of each head",
        "A small histogram of attention probabilities for each layer (row) and head (column), each to its own height.",
        [[[count / head["pairs"] for count in head["counts"]] for head in layer["heads"]] for layer in layers],
    )
    note = f"Rows are layers, columns heads; each from {power(found['edges'][0])} to 1 and to its own height."
    return Section(
        "Distribution",
        words.shape_headline(),
        "Bars: the share of probabilities in each factor of two (left axis). Lines: the share that is smaller (right "
        f"axis), bold for the layer, thin for each of its heads. The dotted line marks {threshold(words.mark)}.",
        [
            Group("", "", [(f"layer-{index}", panel) for index, panel in enumerate(panels)], "small"),
            Group("Every head's histogram", note, [("heads", grid)], "wide", folded=True),
        ],
        [_histogram_table(found)],
    )


def _panel(edges: Sequence[float], index: int, layer: Body, top: float, words: Words) -> Element:
    every = layer["all"]
    item = Distribution(
        f"Layer {index}",
        f"Histogram of the attention probabilities of layer {index}, {layer['module']}; "
        f"{percent(words.sparsity(every))} are at or below {threshold(words.mark)}.",
        edges,
        [count / every["pairs"] for count in every["counts"]],
        cumulative(every),
        [cumulative(head) for head in layer["heads"]],
    )
    return distribution(item, top=top, marks=[words.mark])


def cumulative(summary: Body) -> list[float]:
    """The share of pairs below each edge."""
    total, curve = summary["beneath"], [summary["beneath"] / summary["pairs"]]
    for count in summary["counts"]:
        total += count
        curve.append(total / summary["pairs"])
    return curve


def _histogram_table(found: Body) -> Table:
    """Shares of each bin in all layers together and in each."""
    layers = [found["all"], *(layer["all"] for layer in found["layers"])]
    columns = ["from", "to", "all", *(f"layer {index}" for index in range(len(found["layers"])))]
    rows = [["0", power(found["edges"][0]), *(percent(item["beneath"] / item["pairs"], 2) for item in layers)]]
    for index, (low, high) in enumerate(pairwise(found["edges"])):
        shares = (percent(item["counts"][index] / item["pairs"], 2) for item in layers)
        rows.append([power(low), power(high), *shares])
    return Table("histogram of all layers", columns, rows, 2)


def _pruning(body: Body, words: Words) -> Section:
    points = words.pruning
    measured = charts(THRESHOLD, [Series("", points, "prune")], words)
    # Zeros are shown beside the mass that they held.
    figures = [("threshold-cut", line_chart(_cut(body["distribution"]))), *measured[:-1]]
    return Section(
        "Pruning",
        words.pruning_headline(),
        "Probabilities that are not above the threshold become zero; nothing else is changed.",
        [Group("", "", figures, "pair")],
        [table("scores against threshold", points, words)],
    )


def _cut(found: Body) -> Chart:
    """Zeros, and the mass that they held."""
    lines = []
    for label, name, colour in (("probabilities", "sparsity", "prune"), ("their mass", "lost", "best")):
        pairs = list(zip(found["thresholds"], found["all"][name], strict=True))
        dots = [Dot(x, 100 * y, f"{percent(y, 2)} of {label} at or below {threshold(x)}") for x, y in pairs]
        lines.append(Line(label, dots, colour))
    return Chart(
        title="What a threshold cuts off",
        description="; ".join(dot.told for line in lines for dot in line.dots),
        across="threshold",
        up="%",
        lines=lines,
        tick=threshold,
        ticks_x=found["thresholds"],
        logarithmic_x=True,
        bounds=(0.0, 100.0),
    )


def _codes(words: Words, cut: float) -> Section:
    points, series = words.codes(cut), []
    for mapping, pruned, label in FORMS:
        own = [p for p in points if p["mapping"] == mapping and (p["threshold"] is not None) is pruned]
        series += [Series(label, own, mapping, open=not pruned)] if own else []
    coded = [found for found in words.artifacts if found["bits"] is not None]
    series += [Series("artifact", sorted(coded, key=lambda found: found["bits"]), "best")] if coded else []
    suffix = "" if len(words.cuts) == 1 else f"-{cut:g}"
    return Section(
        f"Bits, pruned at {threshold(cut)}",
        words.codes_headline(cut),
        f"Probabilities as codes of a few bits. Log spends its codes on the decades between {threshold(cut)} and 1, "
        "linear on equal steps. Dashed: not pruned, so that codes have to reach further down.",
        [Group("", "", charts(BITS, series, words, suffix), "pair")],
        [table(f"scores against bits, pruned at {threshold(cut)} and not pruned", [*points, *words.artifacts], words)],
    )


def _facts(body: Body, words: Words) -> list[tuple[str, str]]:
    settings, found, check = body["settings"], body["distribution"], body["distribution"]["check"]
    same = [] if check["agreement"] is None else [f"{percent(check['agreement'] / 100, 2)} of predictions unchanged"]
    same += [] if check["kl"] is None else [f"KL {check['kl']:.2g} nats"]
    return [
        ("model", f"{words.name} ({body['architecture']})"),
        ("task", f"{body['task']}, {body['split'] or 'the file as it is'}"),
        ("data", f"{words.data}: {number(body['n'], 0)} {body['unit']}"),
        ("sequences", f"{number(found['sequences'], 0)}, mean length {number(found['mean_length'], 1)} tokens"),
        ("rows of a head", f"{number(found['rows'], 0)}, of {number(found['mean_keys'], 1)} tokens on average"),
        ("pairs of a head", number(found["pairs"], 0)),
        ("batches", f"{settings['batch_size']} rows, at most {settings['max_length']} tokens"),
        ("float model", f"{words.metric} {words.score(words.float)}, {settings['dtype']}"),
        ("the model as it was looked at, against float", ", ".join(same)),
        ("threads", str(settings["threads"])),
        ("versions", ", ".join(f"{name} {version}" for name, version in settings["versions"].items())),
    ]
