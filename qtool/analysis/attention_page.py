"""The page of a study of attention: from the JSON of `qtool.analysis.study` to findings, figures and tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from qtool.analysis.charts import Chart, Dot, Line, line_chart
from qtool.analysis.figures import Distribution, Heat, distribution, heat_map, spark_grid
from qtool.analysis.page import Figure, Group, Page, Section, Table, Tile
from qtool.analysis.svg import number, percent, power, threshold
from qtool.analysis.words import Words

Body = Mapping[str, Any]
Point = Mapping[str, Any]

SERIES = (("log", True, "log, pruned"), ("linear", True, "linear, pruned"))
SERIES += (("log", False, "log"), ("linear", False, "linear"))


def page_of(body: Body) -> Page:
    """The page of a study, finished or not."""
    words = Words(body)
    sections = [_where(body, words), _shape(body, words)]
    sections += [_pruning(body, words)] if words.pruning else []
    sections += [_codes(body, words, cut) for cut in words.cuts]
    return Page(
        kicker="Attention study",
        title=words.name,
        finding=words.finding(),
        tiles=_tiles(body, words),
        sections=sections,
        facts=_facts(body, words),
        notes=NOTES,
    )


NOTES = (
    "Only pairs that exist are counted: queries of padding are left out, and keys that a query may not see, because they "
    "are padding or come later. Sparsity depends on length (the longer a row, the smaller its probabilities), so it is "
    "stated with the mean length.",
    "Pruning sets probabilities that are not above the threshold to zero. Log codes have bins that are equally wide in "
    "the logarithm, from the threshold (or, not pruned, from 10⁻¹⁰) to 1, linear ones equally wide bins; a code stands for "
    "the middle of its bin, and rows are not renormalised. This is the plain form of Ji et al., On the Distribution, "
    "Sparsity, and Inference-time Quantization of Attention Values in Transformers, Findings of ACL 2021.",
    "Every point is measured on the same batches as the float model, in the same process. Bands are 95 % confidence "
    "intervals of the difference from float, paired by example: a float line inside a band means no loss was shown. "
    "Dispersion is the entropy of a row by the logarithm of its length: 1 where attention is even, 0 where it goes to one "
    "token.",
)  # fmt: skip


def _tiles(body: Body, words: "Words") -> list[Tile]:
    every = body["distribution"]["all"]
    tiles = [
        Tile(
            percent(words.sparsity(every)),
            f"at or below {threshold(words.mark)}",
            f"of all attention probabilities, at a mean length of {number(words.length, 0)} tokens",
        ),
        Tile(
            f"{every['half_median']:g}",
            "tokens carry half of a row",
            f"in the median; {number(every['half_mean'], 1)} on average, of {number(words.keys, 0)} that a row sees",
        ),
    ]
    point = words.at_mark
    if point is not None and point["agreement"] is not None:
        what = f"after pruning at {threshold(point['threshold'])}"
        tiles.append(Tile(f"{number(point['agreement'], 1)} %", "of predictions unchanged", what))
    tiles.append(
        Tile(words.score(body["float"]["score"]), f"{words.metric}, float", f"{number(body['n'], 0)} {body['unit']}")
    )
    return tiles


def _where(body: Body, words: "Words") -> Section:
    """Heat maps of layers and heads."""
    layers = body["distribution"]["layers"]
    maps = [
        Heat(
            f"Share at or below {threshold(words.mark)}",
            f"Of each layer (row) and head (column) the share of probabilities at or below {threshold(words.mark)}.",
            words.heads(words.sparsity), lambda v: f"{100 * v:.0f}", lambda v: percent(v), low=0.0, high=1.0,
        ),
        Heat(
            "Tokens that carry half of a row, mean",
            "Of each layer and head how many tokens carry half of a row's mass, on average over rows.",
            words.heads(lambda head: head["half_mean"]), lambda v: number(v, 1 if v < 9.95 else 0),
            lambda v: f"{number(v, 2)} tokens", low=1.0,
        ),
        Heat(
            "Dispersion",
            "Of each layer and head the mean entropy of a row by the logarithm of its length.",
            words.heads(lambda head: head["dispersion"]), lambda v: f"{v:.1f}", lambda v: number(v, 3), low=0.0, high=1.0,
        ),
    ]  # fmt: skip
    names = ("sparsity", "half-mass", "dispersion")
    figures = [(name, heat_map(item)) for name, item in zip(names, maps, strict=True)]
    return Section(
        "Layers and heads",
        words.heads_headline(),
        "A cell is a head. Dark cells on the left are heads that lose most of their probabilities to pruning; the other "
        "two maps say whether that is because they look at few tokens.",
        [Group("", "", figures, "triple")],
        [_head_table(layers, body["distribution"]["thresholds"])],
    )


def _head_table(layers: Sequence[Any], limits: Sequence[float]) -> Table:
    columns = ["layer", "head", *(f"≤ {threshold(limit)}" for limit in limits)]
    columns += ["half: mean", "half: median", "entropy, nats", "dispersion"]
    rows = []
    for index, layer in enumerate(layers):
        for head, item in [*enumerate(layer["heads"]), ("all", layer["all"])]:
            shares = [percent(share, 2) for share in item["sparsity"]]
            ends = [number(item["half_mean"]), f"{item['half_median']:g}"]
            rows.append(
                [str(index), str(head), *shares, *ends, number(item["entropy"], 3), number(item["dispersion"], 3)]
            )
    return Table("sparsity, half of the mass and dispersion of every head", columns, rows, 2)


def _shape(body: Body, words: "Words") -> Section:
    """A panel a layer; under a fold a small histogram a head."""
    found = body["distribution"]
    layers = found["layers"]
    top = max(max(count / layer["all"]["pairs"] for count in layer["all"]["counts"]) for layer in layers)
    figures = [
        (f"layer-{index}", _panel(found["edges"], index, layer, top, words)) for index, layer in enumerate(layers)
    ]
    grid = spark_grid(
        "Histogram of each head",
        "A small histogram of attention probabilities for each layer (row) and head (column), each to its own scale.",
        [[[c / head["pairs"] for c in head["counts"]] for head in layer["heads"]] for layer in layers],
    )
    low, high = power(1e-7), "1"
    return Section(
        "Distribution",
        words.shape_headline(),
        "Bars: the share of probabilities in each factor of two (left axis). Lines: the share that is smaller (right "
        "axis), bold for the layer, thin for each of its heads.",
        [
            Group("", "", figures, "small"),
            Group(
                "Every head's histogram",
                f"Rows are layers, columns heads; each from {low} to {high} and to its own height.",
                [("heads", grid)],
                "wide",
                folded=True,
            ),
        ],
        [_histogram_table(found)],
    )


def _panel(edges: Sequence[float], index: int, layer: Body, top: float, words: "Words") -> Any:
    every = layer["all"]
    item = Distribution(
        f"Layer {index}",
        f"Histogram of the attention probabilities of layer {index}, {layer['module']}; "
        f"{percent(words.sparsity(every))} are at or below {threshold(words.mark)}.",
        edges,
        [count / every["pairs"] for count in every["counts"]],
        every["beneath"] / every["pairs"],
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
    for index, (low, high) in enumerate(zip(found["edges"], found["edges"][1:], strict=False)):
        shares = (percent(item["counts"][index] / item["pairs"], 2) for item in layers)
        rows.append([power(low), power(high), *shares])
    return Table("histogram of all layers", columns, rows, 2)


def _pruning(body: Body, words: "Words") -> Section:
    points = words.pruning
    lines = {
        "threshold-score": [Line("", _dots(points, "threshold", words), "prune")],
        "threshold-agreement": [
            Line("", _plain(points, "threshold", "agreement", "of predictions unchanged"), "prune")
        ],
    }
    return Section(
        "Pruning",
        words.pruning_headline(),
        "Probabilities that are not above the threshold become zero; nothing else is changed.",
        [Group("", "", _charts(lines, words, "threshold", "threshold of pruning"), "pair")],
        [_point_table("scores against threshold", points, words)],
    )


def _codes(body: Body, words: "Words", cut: float) -> Section:
    points = words.codes(cut)
    series: dict[str, list[Line]] = {"score": [], "agreement": []}
    for mapping, pruned, label in SERIES:
        own = [p for p in points if p["mapping"] == mapping and (p["threshold"] is not None) is pruned]
        if own:
            series["score"].append(Line(label, _dots(own, "bits", words, band=pruned), mapping, open=not pruned))
            agreement = _plain(own, "bits", "agreement", f"of predictions unchanged, {label}")
            series["agreement"].append(Line(label, agreement, mapping, open=not pruned))
    suffix = "" if len(words.cuts) == 1 else f"-{cut:g}"
    named = {f"bits-{name}{suffix}": lines for name, lines in series.items()}
    return Section(
        f"Bits, pruned at {threshold(cut)}",
        words.codes_headline(cut),
        f"Probabilities as codes of a few bits. Log spends its codes on the decades between {threshold(cut)} and 1, linear "
        "on equal steps; the variants that are not pruned have to reach further down.",
        [Group("", "", _charts(named, words, "bits", "bits of a probability"), "pair")],
        [_point_table(f"scores against bits, pruned at {threshold(cut)} and not pruned", points, words)],
        [(f"c-{mapping}" + ("" if pruned else " open"), label) for mapping, pruned, label in SERIES],
    )


def _charts(lines: Mapping[str, list[Line]], words: "Words", axis: str, across: str) -> list[Figure]:
    """The chart of scores, and that of agreement where there is one."""
    figures = []
    for name, own in lines.items():
        dots = [dot for line in own for dot in line.dots]
        if not dots:
            continue
        is_score = "score" in name
        logarithmic = axis == "threshold"
        chart = Chart(
            title=f"{words.metric} against {axis}" if is_score else f"Predictions unchanged against {axis}",
            description=_told(own),
            across=across,
            up=words.unit if is_score else "%",
            lines=own,
            tick=threshold if logarithmic else lambda value: f"{value:g}",
            logarithmic_x=logarithmic,
            logarithmic_y=is_score and words.relative,
            ticks_x=None if logarithmic else sorted({dot.x for dot in dots}),
            reference=(words.float, "float") if is_score else (100.0, "float"),
            least=2.0 if is_score else 1.0,
            bounds=(float("-inf"), float("inf")) if is_score and words.relative else (0.0, 100.0),
        )
        figures.append((name, line_chart(chart)))
    return figures


def _told(lines: Sequence[Line]) -> str:
    """A chart in words, for those who cannot see it."""
    return " ".join(
        f"{line.label + ': ' if line.label else ''}{'; '.join(dot.told for dot in line.dots)}." for line in lines
    )


def _dots(points: Sequence[Point], axis: str, words: "Words", band: bool = True) -> list[Dot]:
    """Scores with the interval that that of the drop means."""
    dots = []
    for point in points:
        if point["score"] is None:
            continue
        low, high = words.interval(point) if band else (None, None)
        told = f"{words.setting(point)}: {words.metric} {words.score(point['score'])} ({words.loss(point)})"
        dots.append(Dot(point[axis], point["score"], told, low, high))
    return dots


def _plain(points: Sequence[Point], axis: str, name: str, what: str) -> list[Dot]:
    return [
        Dot(point[axis], point[name], f"{axis} {point[axis]:g}: {number(point[name], 2)} % {what}")
        for point in points
        if point[name] is not None
    ]


def _point_table(title: str, points: Sequence[Point], words: "Words") -> Table:
    columns = ["", words.metric, "drop", "95 % interval", "unchanged", "KL, nats", "zeros"]
    rows = [["float", words.score(words.float), *["–"] * 5]]
    for point in points:
        low, high = point["interval"] or (None, None)
        suffix = " %" if words.relative else ""
        rows.append([
            words.setting(point),
            words.score(point["score"]),
            number(point["drop"], 2, signed=True) + suffix,
            f"[{number(low, 2, signed=True)}, {number(high, 2, signed=True)}]",
            "–" if point["agreement"] is None else f"{number(point['agreement'], 2)} %",
            "–" if point["kl"] is None else f"{point['kl']:.3g}",
            percent(point["zeros"]),
        ])  # fmt: skip
    return Table(title, columns, rows, 1)


def _facts(body: Body, words: "Words") -> list[tuple[str, str]]:
    settings, found = body["settings"], body["distribution"]
    versions = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
    return [
        ("model", f"{body['model']} ({body['architecture']})"),
        ("task", f"{body['task']}, {body['split'] or 'the file as it is'}"),
        ("data", f"{body['data']}: {number(body['n'], 0)} {body['unit']}"),
        ("sequences", f"{number(found['sequences'], 0)}, mean length {number(found['mean_length'], 1)} tokens"),
        ("rows of a head", f"{number(found['rows'], 0)}, of {number(found['mean_keys'], 1)} tokens on average"),
        ("pairs of a head", number(found["pairs"], 0)),
        ("batches", f"{settings['batch_size']} rows, at most {settings['max_length']} tokens"),
        ("float model", f"{words.metric} {words.score(words.float)}, {settings['dtype']}"),
        ("looked at, against float", _check(found["check"])),
        ("threads", str(settings["threads"])),
        ("versions", versions),
    ]


def _check(check: Mapping[str, Any]) -> str:
    said = [] if check["agreement"] is None else [f"{number(check['agreement'], 2)} % of predictions unchanged"]
    said += [] if check["kl"] is None else [f"KL {check['kl']:.2g} nats"]
    return ", ".join(said) or "–"
