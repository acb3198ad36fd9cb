"""Recipes: which layer wins, what is refused and how it is said, and that a recipe survives being written."""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qtool import cli, recipe
from qtool.api import calibration_texts, resolve_recipe
from qtool.errors import InputError, UsageError
from qtool.methods import METHODS, Entry
from qtool.methods import build as build_methods
from qtool.numerics import QuantSpec
from qtool.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a recipe file and returns its name."""

    def written(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return written


def built(values: Mapping[str, Any]) -> Recipe:
    return recipe.build([("test", values)])


def typed(*arguments: str) -> Recipe:
    """The recipe of `qtool quantize MODEL` with these arguments."""
    parent = click.Context(cli.cli, **cli.CONTEXT)  # click keeps the help option of a command's first context
    with cli.quantize.quantize.make_context("quantize", ["MODEL", *arguments], parent) as context:
        return cli.options.recipe_of(context, "MODEL")


# Layers, weakest first, with the value that each gives to calibration.num_samples.
LAYERS = {"default": 256, "preset": 2, "file": 3, "--set": 4, "command line": 5}


@pytest.mark.parametrize("named", ["by the method", "in the file"])
@pytest.mark.parametrize("layers", [c for n in range(5) for c in itertools.combinations(list(LAYERS)[1:], n)])
def test_the_strongest_layer_wins(
    layers: tuple[str, ...], named: str, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_samples = f"{{num_samples: {LAYERS['preset']}}}"
    text = f"methods: [zeroquant]\ncalibration: {num_samples if 'preset' in layers else '{}'}"
    monkeypatch.setattr(recipe.files, "presets", lambda: {"zeroquant-w8a8": "methods: [zeroquant]", "mine": text})
    if named == "by the method":
        entry = Entry(METHODS["zeroquant"].target, "", "mine", "")
        monkeypatch.setitem(METHODS, "zeroquant", entry)
    lines = ["methods: [zeroquant]"] if named == "by the method" else ["preset: mine"]
    lines += [f"calibration: {{num_samples: {LAYERS['file']}}}"] if "file" in layers else []
    arguments = ["-c", write("\n".join(lines))]
    arguments += ["--set", f"calibration.num_samples={LAYERS['--set']}"] if "--set" in layers else []
    arguments += ["--num-samples", str(LAYERS["command line"])] if "command line" in layers else []
    strongest = layers[-1] if layers else "default"
    assert typed(*arguments).calibration.num_samples == LAYERS[strongest]


def test_a_flag_at_its_default_overrides_nothing(write: Write) -> None:
    found = typed(
        "-c", write("methods: [zeroquant]\nseed: 7\nthreads: 3\nevaluate: {task: sst2}\nmodel: {revision: r}")
    )
    assert (found.seed, found.threads, found.evaluate.task, found.model.revision) == (7, 3, "sst2", "r")


def test_flags_reach_their_sections() -> None:
    found = typed("--method", "zeroquant", "--task", "sst2", "--data", "D", "--max-length", "9", "--batch-size", "5")
    assert found.model.name == "MODEL"
    assert (found.evaluate.task, found.evaluate.data) == ("sst2", "D")
    assert (found.calibration.max_length, found.evaluate.max_length) == (9, 9)
    assert (found.calibration.batch_size, found.evaluate.batch_size) == (5, 5)


@pytest.mark.parametrize("chosen", [("--method", "zeroquant"), ("-c", "zeroquant-w8a8-static")])
def test_data_without_a_task_is_calibration_text(chosen: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "D.csv").write_text("title,body\na,one\nb,two\n")
    found = typed(*chosen, "--data", str(tmp_path / "D.csv"), "--text-column", "body")
    assert calibration_texts(found)[0] == ["one", "two"]
    assert len(calibration_texts(typed(*chosen))[0]) == 500


def test_a_file_that_names_other_specs_keeps_the_rest_of_the_preset(write: Write) -> None:
    found = resolve_recipe(config=write("preset: zeroquant-w8a8-static\nweights: {group_size: 16}"))
    assert str(found.weights.spec) == "int8:group:16:sym"
    assert str(found.activations.spec) == "int8:tensor:sym"


# `--set`, on a short spelling below, gives this spec.
MERGED = [
    ("int8:channel:sym", ["weights.group_size=64"], "int8:group:64:sym"),
    ("int6:channel:sym", ["weights.group_size=64"], "int6:group:64:sym"),
    ("int8:group:64:sym", ["weights.num_bits=4"], "int4:group:64:sym"),
    ("int8:group:64:sym", ["weights.strategy=channel"], "int8:channel:sym"),
    ("int8:channel:sym", ["weights.symmetric=false"], "int8:channel:asym"),
    ("int8:channel:sym", ["weights.strategy=rows", "weights.group_size=4"], "int8:rows:4:sym"),
    ("int8:channel:sym", ["weights.group_size=4", "weights.strategy=rows"], "int8:rows:4:sym"),
    ("int8:channel:sym", ["weights.block_structure=[4, 8]"], "int8:block:4x8:sym"),
    ("int6:channel:sym", ["weights.rounding=nearest"], "int6:channel:sym"),
    ("int6:rows:4:sym", ["weights=int8:tensor:sym"], "int8:tensor:sym"),
    ("int6:rows:4:sym", ["weights.spec=int8:tensor:sym"], "int8:tensor:sym"),
    ("int6:rows:4:sym", ["weights=int8:tensor:sym", "weights.group_size=2"], "int8:group:2:sym"),
    ("{spec: 'int6:channel:sym', rounding: nearest}", ["weights.group_size=8"], "int6:group:8:sym"),
    ("{spec: 'int6:channel:sym', group_size: 8}", [], "int6:group:8:sym"),
    ("{num_bits: 6, group_size: 8}", ["weights.spec=int8:channel:sym"], "int8:channel:sym"),
    ("{num_bits: 6}", [], "int6:channel:sym"),
]


@pytest.mark.parametrize(("below", "sets", "expected"), MERGED)
def test_words_and_short_spellings_merge(below: str, sets: list[str], expected: str, write: Write) -> None:
    found = resolve_recipe(config=write(f"methods: [zeroquant]\nweights: {below}"), sets=sets)
    assert str(found.weights.spec) == expected


@pytest.mark.parametrize("name", recipe.presets())
def test_set_changes_a_word_of_a_preset(name: str) -> None:
    found = resolve_recipe(config=name, sets=["weights.group_size=64"])
    plain = resolve_recipe(config=name)
    before = plain.weights.spec
    assert found.weights.spec == QuantSpec(before.num_bits, before.symmetric, False, (1, 64), before.minimum)
    assert found.activations == plain.activations


def test_activations_change_their_strategy_with_its_dynamics() -> None:
    found = resolve_recipe(methods=["zeroquant"], sets=["activations.strategy=tensor"])
    assert found.activations.spec == QuantSpec(8, True, False, (None, None))


specs = st.builds(
    QuantSpec,
    st.integers(2, 32),
    st.booleans(),
    st.booleans(),
    st.tuples(st.none() | st.integers(1, 64), st.none() | st.integers(1, 64)),
)


@given(specs, specs)
def test_any_spec_replaces_any_other_in_either_spelling(old: QuantSpec, new: QuantSpec) -> None:
    for below, above in itertools.product((str(old), old.words(), {"spec": str(old)}), (str(new), new.words())):
        merged = recipe.build([("below", {"weights": below}), ("above", {"weights": above})])
        assert merged.weights.spec == new


def test_options_of_a_method_are_set_and_kept() -> None:
    sets = ["methods.zeroquant.word_embeddings=float", "methods.zeroquant.small_embeddings=int8:channel:sym"]
    (choice,) = resolve_recipe(methods=["zeroquant"], sets=sets).methods
    assert choice.options == {"word_embeddings": "float", "small_embeddings": "int8:channel:sym"}


SPELLINGS = ["zeroquant", "[zeroquant]", "[{name: zeroquant}]", "{zeroquant: {}}", "{zeroquant: }"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_methods(spelling: str, write: Write) -> None:
    (choice,) = resolve_recipe(config=write(f"weights: int8:channel:sym\nmethods: {spelling}")).methods
    assert (choice.name, choice.options) == ("zeroquant", {})


def test_method_on_the_command_line_keeps_the_options_of_the_file(write: Write) -> None:
    file = write("methods: [{name: zeroquant, word_embeddings: float}]")
    (choice,) = resolve_recipe(config=file, methods=["zeroquant"]).methods
    assert choice.options == {"word_embeddings": "float"}


def test_repeated_set_the_last_wins() -> None:
    assert resolve_recipe(methods=["zeroquant"], sets=["seed=1", "seed=2"]).seed == 2


# A recipe text, and what the error must say: the place, and the word that was meant.
TYPOS = [
    ("wieghts: int8:channel:sym", ["did you mean weights?"]),
    ("model: {nam: x}", ["model", "did you mean name?"]),
    ("calibration: {num_sample: 1}", ["calibration", "did you mean num_samples"]),
    ("weights: {group_sise: 64}", ["weights", "did you mean group_size?"]),
    ("weights: {roundin: nearest}", ["weights", "did you mean rounding?"]),
    ("activations: {dinamic: true}", ["activations", "did you mean dynamic?"]),
    ("rules: {'*.query': {wieghts: int8:channel:sym}}", ["rules.*.query", "did you mean weights?"]),
    ("evaluate: {tsk: sst2}", ["evaluate", "did you mean task?"]),
    ("gate: {max_dorp: 1}", ["gate", "did you mean max_drop"]),
]


@pytest.mark.parametrize(("text", "said"), TYPOS)
def test_unknown_keys_name_the_nearest(text: str, said: list[str], write: Write) -> None:
    file = write(f"methods: [zeroquant]\n{text}")
    with pytest.raises(InputError) as caught:
        resolve_recipe(config=file)
    message = str(caught.value)
    assert file in message
    assert "\n" not in message
    for word in said:
        assert word in message


def test_unknown_key_of_set_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"--set: weights: unknown key 'group_sze'; did you mean group_size\?"):
        resolve_recipe(methods=["zeroquant"], sets=["weights.group_sze=64"])


def test_unknown_names_are_usage_on_the_command_line_and_input_in_a_file(write: Write) -> None:
    with pytest.raises(UsageError, match="unknown method 'zeroquan'; did you mean zeroquant"):
        typed("--method", "zeroquan")
    with pytest.raises(UsageError, match="unknown task 'sst3'; did you mean sst2"):
        typed("--method", "zeroquant", "--task", "sst3")
    file = write("methods: [zeroquan]")
    with pytest.raises(InputError, match="unknown method 'zeroquan'; did you mean zeroquant"):
        resolve_recipe(config=file)
    with pytest.raises(InputError, match=r"methods\.zeroquan: unknown method"):
        resolve_recipe(methods=["zeroquant"], sets=["methods.zeroquan.word_embeddings=float"])


@pytest.mark.parametrize("name", ["headprune", "zeroquant"])
def test_a_method_that_is_there_twice_is_refused(name: str, write: Write) -> None:
    """Also where options are set, which are merged by name: the second one must not vanish among them."""
    sets = ("--set", "methods.headprune.heads={0: [1]}") if name == "headprune" else ()
    said = f"method {name} is there twice; name it once"
    with pytest.raises(UsageError, match=said):
        typed("--method", name, "--method", "logattn", "--method", name, *sets)
    for spelling in (f"[{name}, {name}]", f"[{{name: {name}, heads: {{0: [1]}}}}, logattn, {name}]"):
        file = write(f"methods: {spelling}")
        with pytest.raises(InputError, match=rf"recipe\.yaml: {said}"):
            typed("-c", file, *sets)
        with pytest.raises(InputError, match=said):
            typed("-c", file, "--method", name, *sets)
    with pytest.raises(InputError, match=f"method {name} is there twice"):
        build_methods(built({"methods": [name, name]}).with_options(name, {"heads": {0: [1]}} if sets else {}))


REMOTE = [
    "trust_remote_code: true",
    "trust_remote_code: false",
    "trust_remote_code_model: true",
    "model: {trust_remote_code: true}",
    "calibration: {trust_remote_code: true}",
    "weights: {trust_remote_code: true}",
    "activations: {trust_remote_code: true}",
    "rules: {'*': {trust_remote_code: true}}",
    "evaluate: {trust_remote_code: true}",
    "gate: {trust_remote_code: true}",
    "methods: [{name: zeroquant, trust_remote_code: true}]",
    "methods: {zeroquant: {deep: {er: [{trust_remote_code: true}]}}}",
]


@pytest.mark.parametrize("text", REMOTE)
def test_remote_code_is_refused_wherever_it_is_asked_for(text: str, write: Write) -> None:
    with pytest.raises(InputError, match="is not possible; qtool never runs code that comes with a model"):
        resolve_recipe(config=write(text), methods=["zeroquant"])


@pytest.mark.parametrize("key", ["trust_remote_code", "model.trust_remote_code", "methods.zeroquant.trust_remote_code"])
def test_remote_code_is_refused_from_set(key: str) -> None:
    with pytest.raises(InputError, match="qtool never runs code"):
        resolve_recipe(methods=["zeroquant"], sets=[f"{key}=true"])


NOT_YAML = [
    ("seed: 1\nmethods: [zeroquant\nthreads: 2", 3),
    ("seed: 1\n\tmethods: x", 2),
    ("seed: 1\ngate:\n  max_drop: 1\n min_score: 2", 4),
    ("seed: 1\nmethods: !!python/object/apply:os.system [echo]", 2),
    ("seed: &a 1\nthreads: *b", 2),
]


@pytest.mark.parametrize(("text", "line"), NOT_YAML)
def test_bad_yaml_names_file_and_line(text: str, line: int, write: Write) -> None:
    file = write(text)
    with pytest.raises(InputError) as caught:
        resolve_recipe(config=file)
    assert str(caught.value).startswith(f"{file} line {line}: not YAML: ")


UNUSABLE = [
    ("- methods", "#1: a recipe is a mapping of sections, not a str"),
    ("- {methods: zeroquant}\n- {methods: zeroquant}", "holds 2 recipes; `qtool run` takes such a list"),
    ("methods", "a recipe is a mapping of sections, not a str"),
    ("methods: 5", "methods is a list"),
    ("methods: [{nam: zeroquant}]", "methods is a list"),
    ("methods: {zeroquant: float}", r"methods\.zeroquant: options are"),
    ("methods: []", "names no method"),
    ("methods: [zeroquant]\nweights: 8", "weights"),
    ("methods: [zeroquant]\nweights: int8:chanel", "weights: cannot read 'int8:chanel'"),
    ("methods: [zeroquant]\nweights: {num_bits: 99}", "num_bits must be"),
    ("methods: [zeroquant]\nweights: {strategy: chanel}", r"weights.*did you mean channel\?"),
    ("methods: [zeroquant]\nweights: {strategy: group}", "'group' needs group_size"),
    ("methods: [zeroquant]\nrules: {'*': {weights: int99:channel}}", "num_bits must be"),
    ("methods: [zeroquant]\nrules: {'*': flaot}", "rules"),
    ("methods: [zeroquant]\nseed: many", "seed"),
    ("methods: [zeroquant]\nthreads: 0", "threads"),
    ("methods: [zeroquant]\ncalibration: {num_samples: 0}", r"calibration\.num_samples"),
    ("methods: [zeroquant]\ngate: {max_drop: -1}", r"gate\.max_drop"),
    ("methods: [zeroquant]\ngate: {min_score: 101}", r"gate\.min_score"),
    ("methods: [zeroquant]\nevaluate: {split: vaildation}", r"evaluate\.split"),
    ("preset: zeroquant-w8", "unknown preset 'zeroquant-w8'; did you mean zeroquant-w8a8"),
]


@pytest.mark.parametrize(("text", "said"), UNUSABLE)
def test_unusable_values(text: str, said: str, write: Write) -> None:
    with pytest.raises(InputError, match=said):
        resolve_recipe(config=write(text))


@pytest.mark.parametrize("pair", ["seed", "=1", "a..b=1", ".seed=1", "seed=[1"])
def test_malformed_set(pair: str) -> None:
    with pytest.raises(UsageError, match="--set"):
        resolve_recipe(methods=["zeroquant"], sets=[pair])


def test_a_set_that_contradicts_an_earlier_one() -> None:
    with pytest.raises(UsageError, match="an earlier --set gives calibration a value"):
        resolve_recipe(methods=["zeroquant"], sets=["calibration=1", "calibration.num_samples=2"])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name in (str(tmp_path / "absent.yaml"), "absent.yml", str(tmp_path)):
        with pytest.raises(InputError, match="no recipe at"):
            resolve_recipe(config=name)
    (tmp_path / "latin.yaml").write_bytes("methods: [caf\xe9]".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.yaml cannot be read"):
        resolve_recipe(config=str(tmp_path / "latin.yaml"))


def test_later_rules_win_key_by_key() -> None:
    rules = {
        "*": {"weights": "int8:tensor:sym", "activations": "int8:token:sym"},
        "*.query": {"weights": "int8:channel:sym"},
        "*.layer.1.*": "float",
        "*.layer.1.*.query": {"keep_float": False, "activations": "int8:tensor:sym"},
    }
    found = built({"rules": rules})
    plain = found.rule_for("encoder.layer.0.attention.self.key")
    assert (str(plain.weights), str(plain.activations), plain.keep_float) == (
        "int8:tensor:sym",
        "int8:token:sym",
        False,
    )
    query = found.rule_for("encoder.layer.0.attention.self.query")
    assert (str(query.weights), str(query.activations)) == ("int8:channel:sym", "int8:token:sym")
    assert found.rule_for("encoder.layer.1.output.dense").keep_float
    both = found.rule_for("encoder.layer.1.attention.self.query")
    assert (str(both.weights), str(both.activations), both.keep_float) == ("int8:channel:sym", "int8:tensor:sym", False)


def test_a_rule_in_a_higher_layer_keeps_the_words_below() -> None:
    below = {"rules": {"*.query": {"weights": "int6:channel:sym"}}}
    above = {"rules": {"*.query": {"weights": {"group_size": 8}}}}
    found = recipe.build([("below", below), ("above", above)])
    assert str(found.rule_for("a.query").weights) == "int6:group:8:sym"


def test_a_rule_that_matches_nothing_lists_near_misses() -> None:
    paths = [f"bert.encoder.layer.{i}.{part}" for i in range(2) for part in ("attention.self.query", "output.dense")]
    found = built({"rules": {"*": "float", "*.layer.1.attention.self.qeury": "float"}})
    with pytest.raises(InputError) as caught:
        found.check_rules(paths)
    assert "'*.layer.1.attention.self.qeury' matches no module" in str(caught.value)
    assert "near misses: bert.encoder.layer.1.attention.self.query" in str(caught.value)
    with pytest.raises(InputError, match=r"near misses: bert\.encoder"):
        built({"rules": {"zzz": "float"}}).check_rules(paths)
    built({"rules": {"*.dense": "float"}}).check_rules(paths)


def test_a_rule_for_what_its_modules_have_not_is_refused() -> None:
    without = {"weights": ["a.int8_products"], "activations": ["table", "a.int8_products"]}
    paths = ["table", "a.query", "a.int8_products"]
    for glob, key in (("*.int8_products", "weights"), ("table", "activations"), ("*_products", "activations")):
        with pytest.raises(InputError, match=rf"rule '.*' gives {key} to .*, which has none"):
            built({"rules": {glob: {key: "int8:tensor:sym"}}}).check_rules(paths, without)
    built({"rules": {"*": {"activations": "int8:tensor:sym"}, "table": {"weights": "int8:channel:sym"}}}).check_rules(
        paths, without
    )


@pytest.mark.parametrize(
    ("sets", "found"),
    [
        (["lkd=true", "lkd.steps=7"], {"steps": 7}),
        (["lkd.steps=7", "lkd.inputs=student"], {"steps": 7, "inputs": "student"}),
        (["lkd.steps=7", "lkd=true"], True),
    ],
)
def test_settings_of_what_is_on(sets: list[str], found: Any) -> None:
    read = resolve_recipe(methods=["zeroquant"], sets=[f"methods.zeroquant.{pair}" for pair in sets])
    assert read.methods[0].options["lkd"] == found


def test_nested_options_of_a_file_stay_beside_those_that_are_set(write: Write) -> None:
    file = write("methods: [{name: zeroquant, lkd: {steps: 7, inputs: student}}]")
    read = resolve_recipe(config=file, sets=["methods.zeroquant.lkd.steps=9"])
    assert read.methods[0].options["lkd"] == {"steps": 9, "inputs": "student"}


PARTS = {
    "h.0.attn": ["attention.query", "attention.key", "attention.value"],
    "h.0.up": ["ffn.up"],
    "h.0.down": ["ffn.down"],
}


def test_rules_by_part_are_written_out_for_a_model() -> None:
    rules = {
        "h.0.up": {"weights": "int8:tensor:sym", "activations": "int8:tensor:sym"},
        "*": {"activations": "int8:token:sym"},
        "part:ffn.*": {"weights": "int4:group:64:sym"},
        "*.down": {"weights": "int6:channel:sym"},
        "part:attention.*": "float",
    }
    found = built({"rules": rules}).for_parts(PARTS)
    wanted = {
        "h.0.up": ("int4:group:64:sym", False),
        "h.0.down": ("int6:channel:sym", False),
        "h.0.attn": ("None", True),
    }
    for path, (weights, keep) in wanted.items():
        rule = found.rule_for(path)
        assert (str(rule.weights), str(rule.activations), rule.keep_float) == (weights, "int8:token:sym", keep)
    other = found.rule_for("classifier")
    assert (other.weights, str(other.activations)) == (None, "int8:token:sym")
    found.check_rules([*PARTS])


def test_rules_without_parts_stay_as_they_are() -> None:
    found = built({"rules": {"*.up": "float", "*": {"weights": "int8:tensor:sym"}}})
    assert found.for_parts(PARTS) == found


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("part:ffn.upp", r"'part:ffn\.upp' matches no part of this model; it has attention\.query, .*, ffn\.down"),
        ("part:attention.query", r"names attention\.query, but h\.0\.attn is attention\.query, .* in one matrix"),
    ],
)
def test_parts_that_cannot_have_a_rule(rule: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        built({"rules": {rule: "float"}}).for_parts(PARTS)


FULL = {
    "model": {"name": "folder", "revision": "main"},
    "calibration": {"source": "random", "num_samples": 3, "batch_size": 2, "max_length": 7},
    "weights": {"group_size": 16},
    "activations": "int8:tensor:sym",
    "rules": {
        "*": "float",
        "*.query": {"weights": "int8:tensor:sym"},
        "*.dense": {"keep_float": False, "activations": "int8:token:sym"},
    },
    "methods": [{"name": "zeroquant", "word_embeddings": "float"}],
    "evaluate": {"task": "sst2", "data": "D", "text_columns": ["a", "b"], "limit": 5, "allow_weak_baseline": True},
    "gate": {"max_drop": 0.5, "min_score": 80, "min_agreement": 99, "max_kl": 0.01},
    "output": "out",
    "seed": 3,
    "threads": 2,
    "max_memory": "3GB",
}


@pytest.mark.parametrize("values", [FULL, {}, *map(yaml.safe_load, recipe.presets().values())])
def test_a_written_recipe_is_the_same_recipe(values: dict[str, Any], write: Write) -> None:
    once = built(values)
    again = built(recipe.read(write(once.to_yaml())))
    assert again == once
    assert again.to_yaml() == once.to_yaml()
    assert again.quantization_part() == once.quantization_part()
    for path in ("a.query", "a.dense", "a.key"):
        assert again.rule_for(path) == once.rule_for(path)


@given(specs, specs)
def test_any_spec_survives_being_written(weights: QuantSpec, activations: QuantSpec) -> None:
    once = built({"weights": weights.words(), "rules": {"*": {"activations": str(activations)}}})
    assert built(yaml.safe_load(once.to_yaml())) == once


def test_the_order_of_rules_is_part_of_what_decides_the_bytes() -> None:
    rules = {"*": {"weights": "int8:tensor:sym"}, "*.query": {"weights": "int8:channel:sym"}}
    turned = dict(reversed(rules.items()))
    parts = [built({"rules": r}).quantization_part() for r in (rules, turned)]
    assert yaml.safe_dump(parts[0]) != yaml.safe_dump(parts[1])


def test_what_does_not_decide_the_bytes() -> None:
    plain = built({"methods": ["zeroquant"]})
    other = built(
        {"methods": ["zeroquant"], "output": "x", "threads": 1, "gate": {"max_drop": 1}, "model": {"name": "m"}}
    )
    assert plain.quantization_part() == other.quantization_part()
    assert plain.quantization_part() != built({"methods": ["zeroquant"], "seed": 1}).quantization_part()


def test_presets_are_those_of_the_checkout() -> None:
    assert recipe.presets() == {path.stem: path.read_text("utf-8") for path in (ROOT / "configs").glob("*.yaml")}
    assert recipe.presets()


def test_presets_of_a_wheel_are_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    monkeypatch.setattr(recipe.files.resources, "files", lambda package: tmp_path)
    assert recipe.preset_folder() == tmp_path / "configs"


@pytest.mark.parametrize("name", recipe.presets())
def test_every_preset_is_valid(name: str) -> None:
    found = resolve_recipe(config=name)
    assert {choice.name for choice in found.methods} <= set(METHODS)
    # A preset says what it means: built alone it is what it is on top of the defaults of its method.
    assert built(recipe.preset(name)) == found


def test_every_method_has_its_preset() -> None:
    """Which heads to cut is another question for each model: there is no preset for it."""
    assert [name for name, entry in METHODS.items() if entry.preset is None] == ["headprune"]
    for name, entry in METHODS.items():
        if entry.preset is None:
            continue
        assert [choice.name for choice in built(recipe.preset(entry.preset)).methods] == [name]


def test_the_schema_can_be_exported() -> None:
    schema = Recipe.model_json_schema()
    assert set(schema["properties"]) == set(FULL)
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("3GB", 3_000_000_000), ("512MiB", 536_870_912), ("1.5 gb", 1_500_000_000), ("2TiB", 2 << 40), ("7kb", 7000),
        ("100B", 100), ("12", 12), (4096, 4096),
    ],
)  # fmt: skip
def test_sizes(text: Any, size: int, write: Write) -> None:
    assert built({"max_memory": text}).max_memory == size
    assert typed("--method", "zeroquant", "--max-memory", str(text)).max_memory == size
    again = built(yaml.safe_load(built({"max_memory": text}).to_yaml()))
    assert again.max_memory == size


def test_the_memory_of_a_run_decides_no_byte() -> None:
    assert built({"max_memory": "1GB"}).quantization_part() == built({}).quantization_part()


@pytest.mark.parametrize("text", ["", "3 GX", "-1", "0", "0.1B", "GB", True, None])
def test_other_words_are_no_sizes(text: Any) -> None:
    if text is None:
        assert built({"max_memory": None}).max_memory is None
        return
    with pytest.raises(InputError, match=r"max_memory.*no size; write one such as 3GB or 512MiB"):
        built({"max_memory": text})
