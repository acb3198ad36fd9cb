"""I-BERT as a method: what it refuses, what each option does, how close it comes, and that its bytes are repeatable.

That every integer is the one of the equations is in test_ibert_oracle.py; here float models are what is compared with.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import qtool
from qtool import artifact
from qtool.api import calibration_batches, open_job, quantize_events, resolve_recipe
from qtool.errors import InputError
from qtool.methods.ibert import IBertOptions
from qtool.nn.integer.module import integer_outputs
from qtool.rundir import beside

Command = Callable[..., Any]

SEQUENCE, TOKENS, ANSWERS, MASKED = (
    f"For{head}" for head in ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM")
)
DATA = ("calibration.source=random", "calibration.num_samples=16", "calibration.max_length=12")
# Weights like a trained model's: those of the zoo are so large that two blocks make any error a large one.
CALM = {"initializer_range": 0.15}
STATIC = "activations=int8:tensor:sym"


def option(**values: Any) -> list[str]:
    """`--set` strings of options of the method."""
    return [f"methods.ibert.{name}={json.dumps(value).strip(chr(34))}" for name, value in values.items()]


def quantized(model: Path, out: str, *sets: str, **arguments: Any) -> Path:
    """An artifact in the working directory, calibrated on a few random tokens."""
    return qtool.quantize(str(model), method="ibert", output=out, set=[*DATA, *sets], **arguments).path


def shaped(zoo: Any, name: str, architecture: str, *, change: Any = None, **options: Any) -> Path:
    """A float model with biases of some size."""
    if architecture.startswith("DistilBert"):
        options = {"hidden_dim": 48, **options}
    if architecture.endswith((SEQUENCE, TOKENS)) and "labels" not in options:
        options = {"num_labels": 3, **options}
    shape = {**CALM, **options}
    made: Path = zoo.make(name, architecture, words=None, change=change or zoo.noise(0.05), **shape)
    return made


def loaded(folder: Path) -> Any:
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    return getattr(transformers, architecture).from_pretrained(folder).eval()


def texts() -> dict[str, torch.Tensor]:
    """Ids that calibration draws from too, one text padded."""
    ids = torch.randint(32, 65, (12, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def outputs(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that a model returns, without padded tokens: float64 `[rows, …]`."""
    given = texts()
    with torch.no_grad():
        found = loaded(folder)(**given)
    real = given["attention_mask"].bool()
    tensors = {name: value.double() for name, value in found.items() if isinstance(value, torch.Tensor)}
    return {name: value[real] if value.shape[:2] == real.shape else value for name, value in tensors.items()}


def distance(exact: torch.Tensor, found: torch.Tensor) -> float:
    """Root mean square of the error, relative to how far the float numbers are from their own mean."""
    return float((exact - found).square().mean().sqrt() / (exact - exact.mean(0)).square().mean().sqrt())


def distances(model: Path, out: Path) -> dict[str, float]:
    exact, found = outputs(model), outputs(out)
    assert set(exact) == set(found)
    return {name: distance(value, found[name]) for name, value in exact.items()}


def deciding(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "model.safetensors").read_bytes(), (folder / "config.json").read_bytes()


def figures(folder: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads((folder / "qtool.json").read_text())["figures"]
    return found


# --- close to float, for every head of every family

FAMILIES = ("Bert", "Roberta", "XLMRoberta", "Camembert", "DistilBert", "Electra")
EVERY_TIME = {f"Bert{TOKENS}", f"Roberta{SEQUENCE}", "XLMRobertaModel", f"Camembert{MASKED}", f"DistilBert{SEQUENCE}",
              f"Electra{ANSWERS}"}  # fmt: skip
LIMIT = 0.08
"""What W8A8 with exact functions in between costs models of this size, with some room."""


@pytest.mark.parametrize(
    "architecture",
    [
        name if name in EVERY_TIME else pytest.param(name, marks=pytest.mark.slow)
        for name in (f"{family}{head}" for family in FAMILIES for head in (SEQUENCE, TOKENS, ANSWERS, MASKED, "Model"))
    ],
)
def test_every_head_of_every_family_is_close_to_float(architecture: str, zoo: Any, desk: Path) -> None:
    model = shaped(zoo, "float", architecture)
    out = quantized(model, "out")
    found = distances(model, out)
    assert found and max(found.values()) < LIMIT, found
    kept = json.loads((out / "qtool.json").read_text())["kept_float"]
    assert kept == {}
    floats = {name for name, value in load_file(out / "model.safetensors").items() if value.is_floating_point()}
    assert all(name.endswith("embeddings.anchor") for name in floats), "no number of the model is a float"


@pytest.mark.parametrize(
    ("architecture", "act"),
    [
        (f"Bert{SEQUENCE}", "relu"), (f"Roberta{MASKED}", "silu"), (f"Electra{TOKENS}", "gelu_new"),
        *(pytest.param(f"Bert{MASKED}", act, marks=pytest.mark.slow)
          for act in ("relu", "silu", "swish", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "mish")),
        *(pytest.param(f"DistilBert{MASKED}", act, marks=pytest.mark.slow) for act in ("relu", "silu", "gelu_new")),
    ],
)  # fmt: skip
def test_other_activations_are_close_to_float(architecture: str, act: str, zoo: Any, desk: Path) -> None:
    key = "activation" if architecture.startswith("DistilBert") else "hidden_act"
    model = shaped(zoo, "float", architecture, **{key: act})
    found = distances(model, quantized(model, "out"))
    assert max(found.values()) < LIMIT, found


@pytest.mark.parametrize(
    "sets",
    [option(gelu="polynomial"), pytest.param(option(gelu="polynomial", shifted_gelu=False), marks=pytest.mark.slow)],
)
def test_the_polynomial_is_close_and_not_the_table(sets: list[str], shelf: Any, desk: Path) -> None:
    model = shaped(shelf, "polynomial", f"Bert{SEQUENCE}", change=shelf.noise(0.1))
    (table,), (polynomial,) = (
        distances(model, quantized(model, out, *given)).values() for out, given in (("table", ()), ("poly", sets))
    )
    assert table != polynomial < 3 * LIMIT


@pytest.mark.slow
def test_a_rounding_that_loses_more_is_further_away(shelf: Any, desk: Path) -> None:
    model = shaped(shelf, "coarser", f"Bert{TOKENS}")
    found = [
        distances(model, quantized(model, f"out{number}", *sets))["logits"]
        for number, sets in enumerate(([], ["weights=int6:channel:sym"], ["weights=int5:channel:sym"]))
    ]
    assert found[0] < 0.7 * found[1] < 0.7 * found[2]
    narrow = distances(model, quantized(model, "narrow", *option(residual_bits=8)))["logits"]
    assert narrow > 1.5 * found[0], "why the residual stream is wide"


def test_static_activations_lose_more_where_tokens_differ(shelf: Any, desk: Path) -> None:
    """A neuron behind the activation that is large for some tokens makes the steps of all of them wide."""

    def outlier(model: Any) -> None:
        shelf.noise(0.05)(model)
        for block in model.base_model.encoder.layer:
            block.intermediate.dense.weight[0] *= 40

    model = shaped(shelf, "outlier", f"Bert{SEQUENCE}", change=outlier)
    (token,), (static,) = (
        distances(model, quantized(model, out, *sets, *option(smoothing=None))).values()
        for out, sets in (("token", ()), ("static", (STATIC,)))
    )
    assert token < 2 * LIMIT
    assert static > 1.5 * token


@pytest.mark.parametrize(
    "sets",
    [
        (),
        option(smoothing=None),
        option(centering=False),
        pytest.param(option(clipping="percentile", percentile=100), marks=pytest.mark.slow),
        pytest.param(option(clipping="mse"), marks=pytest.mark.slow),
        pytest.param(option(clipping="token", smoothing=None), marks=pytest.mark.slow),
    ],
)
def test_static_activations_are_close_under_every_treatment_of_their_ranges(
    sets: tuple[str, ...], shelf: Any, desk: Path
) -> None:
    model = shaped(shelf, "static", f"Bert{SEQUENCE}", change=shelf.noise(0.1))
    (found,) = distances(model, quantized(model, "out", STATIC, *sets)).values()
    assert found < 4 * LIMIT


def test_the_context_fits_where_a_value_channel_is_lopsided(shelf: Any, desk: Path) -> None:
    """One rare token pulls the middle of a value channel far from what attention usually gives."""

    def lopsided(model: Any) -> None:
        shelf.noise(0.05)(model)
        base = model.base_model
        table, value = base.embeddings.word_embeddings.weight, base.encoder.layer[0].attention.self.value
        table[7] = 0
        table[7, 0] = 50 * table.std()
        value.weight[3] = 0
        value.weight[3, 0] = 20

    model = shaped(shelf, "lopsided", "BertModel", change=lopsided)
    found = figures(quantized(model, "out"))
    assert found["encoder.layer.0.attention.self"]["saturated_percent"] == 0
    assert found["encoder.layer.0.attention.output.dense"]["sqnr_db"] > 25


def test_labels_and_tokenizer_come_along(tiny: Any, desk: Path) -> None:
    out = quantized(tiny.model, "out")
    assert loaded(out).config.id2label == {0: "negative", 1: "positive"}
    tokenizers = [transformers.AutoTokenizer.from_pretrained(folder) for folder in (tiny.model, out)]
    assert tokenizers[0]("w1 w2 w59").input_ids == tokenizers[1]("w1 w2 w59").input_ids


# --- what is stored


def rows_on_a_grid(weight: torch.Tensor, qmax: int) -> Any:
    """Codes of a table, a scale for each row, in float64."""
    values = weight.double().numpy()
    scale = (np.abs(values).max(1, keepdims=True) / qmax).astype(np.float32).astype(np.float64)
    return np.clip(np.floor(values / np.where(scale > 0, scale, 1) + 0.5), -qmax, qmax).astype(np.int64)


@pytest.mark.parametrize("architecture", ["BertModel", f"DistilBert{TOKENS}", f"Electra{SEQUENCE}"])
def test_words_are_int8_and_other_tables_int16(architecture: str, zoo: Any, desk: Path) -> None:
    model = shaped(zoo, "float", architecture)
    stored = load_file(quantized(model, "out") / "model.safetensors")
    floats = load_file(model / "model.safetensors")
    tables = {name: value for name, value in floats.items() if "_embeddings.weight" in name}
    assert len(tables) == (2 if architecture.startswith("DistilBert") else 3)
    for name, weight in tables.items():
        word = "word_embeddings" in name
        assert stored[name].dtype == (torch.int8 if word else torch.int16)
        expected = rows_on_a_grid(weight, 127 if word else 32767)
        np.testing.assert_array_equal(stored[name].squeeze(1).numpy(), expected, err_msg=name)


@pytest.mark.parametrize("architecture", [f"Bert{MASKED}", f"Electra{MASKED}"])
def test_a_tied_head_stores_the_table_once(architecture: str, zoo: Any, desk: Path) -> None:
    """65 words × 32 columns; untied, the output layer has tiles of its own: 80 padded rows."""
    sizes, codes = [], []
    width = {"embedding_size": 32} if architecture.startswith("Electra") else {}
    for name, tied in (("tied", True), ("untied", False)):
        out = quantized(shaped(zoo, name, architecture, tie_word_embeddings=tied, **width), f"{name}-out")
        stored = load_file(out / "model.safetensors")
        sizes.append(sum(value.numel() * value.element_size() for value in stored.values()))
        codes.append([path for path, value in stored.items() if value.numel() >= 65 * 32 and value.dtype == torch.int8])
        config = json.loads((out / "config.json").read_text())
        assert config["tie_word_embeddings"] is False, "nothing is left for transformers to tie"
        header = (out / "model.safetensors").stat().st_size - sizes[-1]
        assert 0 < header < 20_000
    assert sizes[1] - sizes[0] == 80 * 32
    assert len(codes[1]) - len(codes[0]) == 1
    assert sum("word_embeddings" in path for path in codes[0]) == 1


@pytest.mark.parametrize("where", ["*word_embeddings", pytest.param("*", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "spelling",
    [
        "int16:channel:sym",
        "int6:channel:sym",
        "int8:tensor:sym",
        pytest.param("int5:tensor:sym", marks=pytest.mark.slow),
    ],
)
def test_a_rule_for_the_words_reaches_the_tied_head(spelling: str, where: str, shelf: Any, desk: Path) -> None:
    """The output layer reads the table as it is stored, or the rule is refused before anything is computed."""
    model = shaped(shelf, "tied-rule", f"Bert{MASKED}")
    rule = f"rules={{'{where}': {{weights: '{spelling}'}}}}"
    if spelling.startswith("int16"):
        with pytest.raises(InputError, match="multiplies by this table, so it takes int5 to int8"):
            open_job(str(model), resolve_recipe(methods=["ibert"], sets=[rule]))
        return
    found = distances(model, quantized(model, "out", rule))
    assert found["logits"] < {"int6": 0.12, "int5": 0.3, "int8": LIMIT}[spelling[:4]], found


# --- plans


PLANS: list[tuple[str, Any, dict[str, Any]]] = [
    (f"Bert{MASKED}", (), {}),
    (f"Roberta{SEQUENCE}", (STATIC, *option(gelu="polynomial")), {}),
    ("BertModel", (), {}),
    (f"Bert{MASKED}", (), {"tie_word_embeddings": False}),
    (f"Electra{TOKENS}", option(smoothing=None, centering=False), {}),
    (f"DistilBert{ANSWERS}", ("weights=int5:tensor:sym",), {"activation": "relu"}),
    (f"Camembert{MASKED}", option(word_embeddings="int8:tensor:sym", gelu_bits=9), {}),
]


@pytest.mark.parametrize(
    ("architecture", "sets", "options"),
    [PLANS[0], *(pytest.param(*plan, marks=pytest.mark.slow) for plan in PLANS[1:])],
)
def test_a_dry_run_tells_the_size_to_the_byte_and_keeps_nothing_in_float(
    architecture: str, sets: tuple[str, ...], options: dict[str, Any], zoo: Any, desk: Path, qtool_command: Command
) -> None:
    model = shaped(zoo, "float", architecture, **options)
    arguments = ["quantize", model, "--method", "ibert", *(part for pair in (*DATA, *sets) for part in ("--set", pair))]
    ended = qtool_command(*arguments, "--dry-run", "--json", "-")
    assert ended.code == 0, ended.err
    table = qtool_command(*arguments, "--dry-run")
    assert list(desk.iterdir()) == []
    plan = json.loads(ended.out)
    assert plan["methods"] == ["ibert"] and plan["kept_float"] == {}
    assert plan["seconds"] > 0 and plan["peak_memory_bytes"] > 1e7
    assert qtool_command(*arguments, "-o", "out").code == 0
    assert plan["size_bytes"] == Path("out/model.safetensors").stat().st_size
    config = json.loads(Path("out/config.json").read_text())["quantization_config"]
    assert plan["quantized"] == config["modules"]
    for path, module in config["modules"].items():
        for inside in (part["path"] for part in module.get("parts", {}).values()):
            assert f"{path}.{inside}".rstrip(".") in table.out


def test_a_dry_run_says_in_a_line_that_nothing_stays_float(tiny: Any, desk: Path, qtool_command: Command) -> None:
    ended = qtool_command("quantize", tiny.model, "--method", "ibert", "--set", DATA[0], "--dry-run")
    assert ended.code == 0
    assert "Kept in float: nothing." in ended.out.splitlines()


# --- refusals

QUERY = "bert.encoder.layer.0.attention.self.query"
NARROW = "ibert takes static symmetric int5 to int8, by channel or tensor"
REFUSED = [
    ("rules={'*.query': float}", f"{QUERY}: ibert leaves nothing in float; take the rule out, or use zeroquant"),
    ("rules={'*': float}", "bert.embeddings.word_embeddings: ibert leaves nothing in float"),
    ("rules={'*word_embeddings': float}", "bert.embeddings.word_embeddings: ibert leaves nothing in float"),
    ("weights=int4:channel:sym", f"{QUERY}: weights int4:channel:sym cannot run; {NARROW}"),
    ("weights=int8:group:64:sym", f"{QUERY}: weights int8:group:64:sym cannot run; {NARROW}"),
    ("weights=int16:channel:sym", f"{QUERY}: weights int16:channel:sym cannot run"),
    ("weights=int8:channel:asym", f"{QUERY}: weights int8:channel:asym cannot run"),
    ("weights=int8:rows:4:sym", f"{QUERY}: weights int8:rows:4:sym cannot run"),
    ("activations=int4:token:sym", f"{QUERY}: activations int4:token:sym cannot run; use int8:token:sym or int8:tens"),
    ("activations=int8:token:asym", f"{QUERY}: activations int8:token:asym cannot run"),
    ("activations=int8:group:16:sym", f"{QUERY}: activations int8:group:16:sym cannot run"),
    ("rules={'*.query': {activations: 'int8:tensor:sym'}}", f"{QUERY}: query, key and value share one input"),
    ("rules={'*.1.*.value': {activations: 'int8:tensor:sym'}}", "layer.1.attention.self.query: query, key and value"),
    ("rules={'*.qeury': float}", "matches no module that can be quantized"),
    ("methods.ibert.word_embeddings=int4:channel:sym", "bert.embeddings.word_embeddings: a table takes static symm"),
    ("methods.ibert.small_embeddings=int8:group:16:sym", "bert.embeddings.position_embeddings: a table takes"),
    ("methods.ibert.word_embeddings=float", "methods.ibert.word_embeddings: cannot read 'float'"),
    ("methods.ibert.residual_bits=24", "methods.ibert.residual_bits"),
    ("methods.ibert.gelu_bits=7", "methods.ibert.gelu_bits"),
    ("methods.ibert.probability_bits=17", "methods.ibert.probability_bits"),
    ("methods.ibert.scores_grid=13", "methods.ibert.scores_grid"),
    ("methods.ibert.smoothing=1.5", "methods.ibert.smoothing"),
    ("methods.ibert.percentile=50", "methods.ibert.percentile"),
    ("methods.ibert.tuning=-1", "methods.ibert.tuning"),
    ("methods.ibert.gelu=tabel", "methods.ibert.gelu"),
    ("methods.ibert.clipping=entropy", "methods.ibert.clipping"),
    ("methods.ibert.residual=8", "unknown option 'residual'; did you mean residual_bits"),
]


@pytest.mark.parametrize(("pair", "said"), REFUSED)
def test_what_cannot_run_is_refused_by_name(pair: str, said: str, tiny: Any) -> None:
    with pytest.raises(InputError) as caught:
        open_job(str(tiny.model), resolve_recipe(methods=["ibert"], sets=[pair]))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


MODELS: list[tuple[str, dict[str, Any], str]] = [
    ("GPT2LMHeadModel", {"bos_token_id": 1, "eos_token_id": 2}, "ibert has no integer form of model type 'gpt2'; it"),
    ("LlamaForCausalLM", {"bos_token_id": 1, "eos_token_id": 2}, "ibert has no integer form of model type 'llama'; it"),
    (f"MPNet{MASKED}", {}, "ibert has no integer form of model type 'mpnet'; it has one of bert, roberta"),
    *((f"Bert{SEQUENCE}", {"hidden_act": act}, f"ibert has no integer form of activation '{act}'; it has of gelu, relu")
      for act in ("tanh", "sigmoid", "relu2", "leaky_relu", "gelu_10", "linear")),
    (f"DistilBert{MASKED}", {"activation": "tanh"}, "ibert has no integer form of activation 'tanh'"),
    ("BertModel", {"position_embedding_type": "relative_key"}, "no integer form of relative_key positions"),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "options", "said"), MODELS)
def test_models_without_an_integer_form_are_refused(
    architecture: str, options: dict[str, Any], said: str, zoo: Any, desk: Path, qtool_command: Command
) -> None:
    model = zoo.make("float", architecture, words=None, **options)
    ended = qtool_command("quantize", model, "--method", "ibert", "-o", "out", "-q")
    assert (ended.code, len(ended.errors), len(ended.err.splitlines())) == (3, 1, 1), ended.err
    assert said in ended.errors[0]
    assert list(desk.iterdir()) == []


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (("weights=int4:channel:sym",), "weights int4:channel:sym cannot run"),
        (("rules={'*.query': float}",), "ibert leaves nothing in float"),
        (
            (STATIC, *option(clipping="token", smoothing=0.5)),
            "clipping: token is for static activations, with smoothing set to null",
        ),
    ],
)
@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_refusals_are_one_line_and_leave_nothing(
    flags: tuple[str, ...], pairs: tuple[str, ...], said: str, tiny: Any, desk: Path, qtool_command: Command
) -> None:
    sets = [part for pair in (*DATA, *pairs) for part in ("--set", pair)]
    ended = qtool_command("quantize", tiny.model, "--method", "ibert", "-o", "out", "-q", *sets, *flags)
    assert (ended.code, len(ended.errors), len(ended.err.splitlines())) == (3, 1, 1), ended.err
    assert said in ended.errors[0]
    assert list(desk.iterdir()) == []


# --- every option does something

PINNED: dict[str, Any] = {
    "residual_bits": 22, "gelu": "table", "gelu_bits": 12, "shifted_gelu": True, "probability_bits": 14,
    "scores_grid": 10, "attention_scales": "channel", "smoothing": 0.5, "tuning": 4, "centering": True,
    "clipping": "max", "percentile": 99.9, "bias_correction": "quantized", "word_embeddings": "int8:channel:sym",
    "small_embeddings": "int16:channel:sym",
}  # fmt: skip
CHANGES: list[tuple[str, Any, dict[str, Any]]] = [
    ("residual_bits", 20, {}), ("residual_bits", 23, {}), ("gelu", "polynomial", {}), ("gelu_bits", 11, {}),
    ("gelu_bits", 13, {"gelu": "polynomial"}), ("shifted_gelu", False, {}),
    ("shifted_gelu", False, {"gelu": "polynomial"}), ("probability_bits", 12, {}), ("scores_grid", 9, {}),
    ("attention_scales", "head", {}), ("attention_scales", "tensor", {}), ("smoothing", None, {"tuning": 0}),
    ("smoothing", 0.3, {}), ("smoothing", 0.3, {"tuning": 0}), ("tuning", 0, {}), ("tuning", 5, {}),
    ("centering", False, {}), ("clipping", "percentile", {}), ("clipping", "mse", {}),
    ("percentile", 95.0, {"clipping": "percentile"}), ("bias_correction", "none", {}),
    ("bias_correction", "float", {}), ("word_embeddings", "int16:channel:sym", {}),
    ("word_embeddings", "int8:tensor:sym", {}), ("small_embeddings", "int8:channel:sym", {}),
]  # fmt: skip
STATIC_CHANGES: list[tuple[str, Any, dict[str, Any]]] = [
    ("clipping", "percentile", {}), ("clipping", "mse", {}), ("clipping", "token", {"smoothing": None, "tuning": 0}),
    ("percentile", 95.0, {"clipping": "token", "smoothing": None, "tuning": 0}),
    ("percentile", 95.0, {"clipping": "percentile"}),
    ("smoothing", None, {"tuning": 0}), ("tuning", 0, {}), ("centering", False, {}),
    ("bias_correction", "none", {}), ("bias_correction", "float", {}),
    ("bias_correction", "none", {"bias_correction": "float"}),
    ("bias_correction", "none", {"bias_correction": "float", "clipping": "mse"}),
]  # fmt: skip


@pytest.fixture(scope="module")
def bytes_under(shelf: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., tuple[bytes, bytes]]]:
    """The deciding files of one small model's artifact under some options; each set of options runs once."""
    model = shaped(shelf, "options", f"Bert{SEQUENCE}", num_hidden_layers=1)
    folder = tmp_path_factory.mktemp("options")
    known: dict[str, tuple[bytes, bytes]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("qtool.pipeline._check_in_fresh_process", lambda *run: None)

        def found(sets: tuple[str, ...], options: Mapping[str, Any]) -> tuple[bytes, bytes]:
            key = repr((sets, sorted(options.items(), key=str)))
            if key not in known:
                known[key] = deciding(quantized(model, f"out{len(known)}", *sets, *option(**options)))
            return known[key]

        yield found


def test_every_option_is_tested() -> None:
    fields = set(IBertOptions.model_fields)
    assert set(PINNED) == fields
    assert {name for name, _, _ in CHANGES} == fields


def words_of(case: tuple[str, Any, dict[str, Any]]) -> str:
    name, value, context = case
    return " ".join([f"{name}={value}", *(f"{key}={other}" for key, other in context.items())])


FIRST = list({case[0]: case for case in reversed(CHANGES)}.values())
"""One change of each option."""


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case in FIRST else pytest.mark.slow, id=words_of(case)) for case in CHANGES],
)
def test_every_option_changes_the_weights(case: tuple[str, Any, dict[str, Any]], bytes_under: Any) -> None:
    name, value, context = case
    before, after = (bytes_under((), {**PINNED, **context, **change}) for change in ({}, {name: value}))
    assert before[0] != after[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", STATIC_CHANGES, ids=words_of)
def test_every_option_changes_the_weights_of_static_activations(
    case: tuple[str, Any, dict[str, Any]], bytes_under: Any
) -> None:
    name, value, context = case
    before, after = (bytes_under((STATIC,), {**PINNED, **context, **change}) for change in ({}, {name: value}))
    assert before[0] != after[0]


# --- the same bytes


def run(model: Path, out: str, *sets: str, resume: bool = False) -> Iterator[Any]:
    recipe = resolve_recipe(methods=["ibert"], sets=[*DATA, *sets], model=str(model))
    return quantize_events(str(model), recipe, Path(out), resume=resume)


CORRECTED = option(bias_correction="quantized", tuning=3)


@pytest.fixture
def masked(shelf: Any) -> Path:
    return shaped(shelf, "masked", f"Bert{MASKED}")


def test_two_runs_give_the_same_files_and_the_preset_is_the_default(
    masked: Path, desk: Path, qtool_command: Command
) -> None:
    one, two = (quantized(masked, out) for out in ("one", "two"))
    assert {path.name: path.read_bytes() for path in one.iterdir()} == {
        path.name: path.read_bytes() for path in two.iterdir()
    }
    sets = [part for pair in DATA for part in ("--set", pair)]
    ended = qtool_command("quantize", masked, "-c", "ibert", "-o", "three", *sets)
    assert ended.code == 0, ended.err
    assert deciding(one) == deciding(desk / "three")


def stop_at(events: Iterator[Any], stage: str, unit: str, *, ended: bool) -> None:
    """Leave a run right after a unit has started, or has ended."""
    for event in events:
        if getattr(event, "stage", "") == stage and event.unit == unit and (event.seconds is not None) == ended:
            events.close()  # type: ignore[attr-defined]
            return
    pytest.fail(f"{stage} {unit} never came")


@pytest.mark.parametrize(
    ("stage", "unit", "ended"),
    [
        ("quantize", "block.0", True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("quantize", "head", False),
                ("calibrate", "block.0", True),
                ("calibrate", "head", True),
                ("quantize", "embeddings", False),
                ("quantize", "embeddings", True),
                ("quantize", "block.1", False),
                ("quantize", "block.1", True),
                ("publish", "assemble", False),
                ("publish", "assemble", True),
                ("publish", "golden check", False),
            )
        ),
    ],
)
def test_a_run_that_stops_anywhere_ends_in_the_same_bytes(
    stage: str, unit: str, ended: bool, masked: Path, desk: Path
) -> None:
    """Corrected biases of finished units are read, not made again; what comes after sees the same numbers."""
    list(run(masked, "whole", *CORRECTED))
    stop_at(run(masked, "out", *CORRECTED), stage, unit, ended=ended)
    assert not Path("out").exists()
    list(run(masked, "out", *CORRECTED, resume=True))
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == {
        path.name: path.read_bytes() for path in Path("whole").iterdir()
    }


@pytest.mark.parametrize("unit", ["block.0", pytest.param("head", marks=pytest.mark.slow)])
def test_a_run_that_dies_between_the_two_files_of_a_unit_ends_in_the_same_bytes(
    unit: str, masked: Path, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures of the corrected unit are on disk, its tensors are not: it is lowered and corrected again."""
    list(run(masked, "whole", *CORRECTED))
    write = artifact.write_tensors

    def dying(path: Path, tensors: Any, **options: Any) -> None:
        if path.stem == unit:
            raise KeyboardInterrupt
        write(path, tensors, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(artifact, "write_tensors", dying)
        list(run(masked, "out", *CORRECTED))
    kept = beside(Path("out"), "run")
    assert (kept / f"{unit}.json").exists() and not (kept / f"{unit}.safetensors").exists()
    list(run(masked, "out", *CORRECTED, resume=True))
    assert deciding(Path("out")) == deciding(Path("whole"))
    assert figures(Path("out")) == figures(Path("whole"))


@pytest.mark.slow
def test_killed_processes_end_in_the_same_bytes(masked: Path, tmp_path: Path) -> None:
    """One output, killed again and again at ever later moments."""

    def start(out: str) -> subprocess.Popen[str]:
        sets = [part for pair in (*DATA, *CORRECTED) for part in ("--set", pair)]
        command = [sys.executable, "-m", "qtool", "quantize", str(masked), "--method", "ibert", *sets]
        command += ["-o", str(tmp_path / out), "-q", "--resume"]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(process: subprocess.Popen[str]) -> None:
        _, said = process.communicate(timeout=240)
        assert (process.returncode, said) == (0, "")

    whole = start("whole")
    finish(whole)
    folder = beside(tmp_path / "out", "run")
    for name in ("block.0", "block.1"):
        process = start("out")
        ends = time.monotonic() + 240
        while not (folder / f"{name}.safetensors").exists() and process.poll() is None:
            assert time.monotonic() < ends
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -9, name
        assert not (tmp_path / "out").exists()
    last = start("out")
    finish(last)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()
    }


@pytest.mark.parametrize(
    "sets", [(), pytest.param((STATIC, *option(clipping="mse", tuning=3)), marks=pytest.mark.slow)]
)
def test_statistics_of_another_run_give_the_same_bytes(
    sets: tuple[str, ...], masked: Path, desk: Path, qtool_command: Command
) -> None:
    arguments = [masked, "--method", "ibert", *(part for pair in (*DATA, *sets) for part in ("--set", pair))]
    for command in (
        ("calibrate", *arguments, "-o", "statistics"),
        ("quantize", *arguments, "--statistics", "statistics", "-o", "one"),
        ("quantize", *arguments, "-o", "two"),
    ):
        ended = qtool_command(*command)
        assert ended.code == 0, ended.err
    assert deciding(Path("one")) == deciding(Path("two"))
    assert figures(Path("one")) == figures(Path("two"))
    # What only rounding reads may differ; what is observed may not.
    others = (("weights=int6:channel:sym", 0), ("calibration.num_samples=15", 3))
    for number, (other, code) in enumerate((*others, *[("methods.ibert.clipping=percentile", 3)][len(sets) :])):
        more = ("--set", other, "-o", f"other{number}", "--statistics", "statistics")
        ended = qtool_command("quantize", *arguments, *more)
        assert (ended.code, len(ended.errors)) == (code, code // 3), (other, ended.err)
        assert code == 0 or "statistics was made with a different" in ended.errors[0]


# --- figures


@contextmanager
def listening(model: Any, sites: list[str]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """What leaves each site, a list over calls."""
    seen: dict[str, list[torch.Tensor]] = {site: [] for site in sites}
    with ExitStack() as stack:
        for site in sites:
            handle = model.get_submodule(site).register_forward_hook(
                lambda _, __, out, site=site: seen[site].append(out.detach().double())
            )
            stack.callback(handle.remove)
        yield seen


def on_calibration(folder: Path, batches: Any, sites: list[str]) -> dict[str, torch.Tensor]:
    """Rows of real tokens (or of texts, behind a pooler) that leave each site of a whole model, float64."""
    model = loaded(folder)
    rows: dict[str, list[torch.Tensor]] = {site: [] for site in sites}
    for batch in batches:
        with listening(model, sites) as seen, torch.no_grad(), integer_outputs():
            model(**batch)
        real = batch["attention_mask"].bool()
        for site, (out,) in seen.items():
            rows[site].append(out[real] if out.dim() == 3 else out)
    return {site: torch.cat(found) for site, found in rows.items()}


LAYERS = [f"bert.encoder.layer.{layer}" for layer in range(2)]
RESIDUAL = [f"{layer}.{name}" for layer in LAYERS for name in
            ("attention.output.dense", "attention.output.LayerNorm", "output.dense", "output.LayerNorm")]  # fmt: skip
"""Modules of the blocks whose outputs are on the grid of the residual stream."""


@pytest.fixture(scope="module")
def texts_file(shelf: Any) -> Path:
    path = shelf.folder / "ibert.txt"
    path.write_text("\n".join(shelf.sentences(16, seed=8)))
    return Path(path)


@pytest.fixture(scope="module")
def worded(shelf: Any) -> Path:
    """A model with a tokenizer, for texts of different lengths."""
    made: Path = shelf.make("worded", change=shelf.noise(0.1), labels=("no", "yes"), **CALM)
    return made


def batches_of(model: Path, sets: list[str]) -> Any:
    return calibration_batches(open_job(str(model), resolve_recipe(methods=["ibert"], sets=sets))).batches


@pytest.mark.parametrize("correction", ["none", "quantized"])
def test_reported_noise_is_what_both_models_show_on_the_calibration_data(
    correction: str, worded: Path, texts_file: Path, desk: Path
) -> None:
    sets = [f"calibration.source={texts_file}", "calibration.batch_size=8", *option(bias_correction=correction)]
    out = qtool.quantize(str(worded), method="ibert", output="out", set=sets).path
    found, batches = figures(out), batches_of(worded, sets)
    assert len(batches) == 2 and any((batch["attention_mask"] == 0).any() for batch in batches)
    sites = ["bert.embeddings.LayerNorm", *RESIDUAL, "classifier"]
    exact, integers = (on_calibration(folder, batches, sites) for folder in (worded, out))
    stored = load_file(out / "model.safetensors")
    for site in sites:
        places = (
            stored["classifier.exponent"]
            if site == "classifier"
            else stored["bert.embeddings.exponents"][int(site == RESIDUAL[-1])]
        ).item()
        real = integers[site] / 2.0**places
        noise = (exact[site] - real).square().sum()
        expected = 10 * (exact[site].square().sum() / noise).log10().item()
        assert found[site]["sqnr_db"] == pytest.approx(expected, abs=0.05)
        assert found[site]["saturated_percent"] == 0
    for layer in LAYERS:
        query, inner = (found[f"{layer}.{name}"] for name in ("attention.self.query", "intermediate.dense"))
        assert {"sqnr_db", "saturated_percent", "weight_sqnr_db", "spare_bits"} == set(query)
        assert 0 < query["sqnr_db"] < 80
        # No noise of what feeds an activation: its grid leaves out what that turns to zero.
        assert {"saturated_percent", "weight_sqnr_db", "spare_bits"} == set(inner)


@pytest.mark.parametrize("padded", [False, True])
def test_saturation_is_counted_where_a_model_must_saturate(
    padded: bool, worded: Path, texts_file: Path, desk: Path
) -> None:
    """Ranges of keys and values that leave two of five values out, counted again with room for them: real tokens."""
    sets = [*DATA, "calibration.batch_size=8", *option(clipping="percentile", percentile=60, bias_correction="none")]
    sets += [f"calibration.source={texts_file}"] if padded else []
    out = qtool.quantize(str(worded), method="ibert", output="out", set=sets).path
    found, batches, model = figures(out), batches_of(worded, sets), loaded(out)
    assert any((batch["attention_mask"] == 0).any() for batch in batches) == padded
    sites = [f"{LAYERS[0]}.attention.self.{name}" for name in ("key", "value")]
    for site in sites:
        model.get_submodule(site).out_bits = 31
    outside, total = dict.fromkeys(sites, 0), dict.fromkeys(sites, 0)
    for batch in batches:
        with listening(model, sites) as seen, torch.no_grad():
            model(**batch)
        for site, (codes,) in seen.items():
            real = codes[batch["attention_mask"].bool()]
            outside[site] += int((real.abs() > 127).sum())
            total[site] += real.numel()
    for site in sites:
        percent = 100 * outside[site] / total[site]
        assert 35 < percent < 45
        assert found[site]["saturated_percent"] == pytest.approx(percent, rel=1e-9)


def test_the_worst_three_are_printed_and_in_the_json(masked: Path, desk: Path, qtool_command: Command) -> None:
    sets = [part for pair in DATA for part in ("--set", pair)]
    ended = qtool_command("quantize", masked, "--method", "ibert", "-o", "out", *sets, "--json", "result.json")
    assert ended.code == 0, ended.err
    measured = {path: found["sqnr_db"] for path, found in figures(Path("out")).items() if "sqnr_db" in found}
    expected = sorted(measured.items(), key=lambda item: item[1])[:3]
    assert len(measured) > 16
    said = json.loads(Path("result.json").read_text())["worst"]
    assert [(row["module"], row["sqnr_db"]) for row in said] == expected
    line = ", ".join(f"{path} ({sqnr:.1f} dB)" for path, sqnr in expected)
    assert f"furthest from float on the calibration data: {line}" in ended.out


def test_bias_correction_takes_the_mean_error_out(worded: Path, texts_file: Path, desk: Path) -> None:
    """Measured in both whole models: the mean over tokens of every channel's error, where linears add to the stream."""
    sites = [path for path in RESIDUAL if path.endswith("dense")]
    sets = [f"calibration.source={texts_file}", "calibration.batch_size=8", "weights=int6:channel:sym"]
    batches = batches_of(worded, sets)
    exact = on_calibration(worded, batches, sites)
    errors = {}
    for how in ("none", "float", "quantized"):
        out = qtool.quantize(str(worded), method="ibert", output=how, set=[*sets, *option(bias_correction=how)]).path
        places = load_file(out / "model.safetensors")["bert.embeddings.exponents"][0].item()
        found = on_calibration(out, batches, sites)
        errors[how] = {
            site: float((exact[site] - found[site] / 2.0**places).mean(0).square().mean().sqrt()) for site in sites
        }
    for site in sites:
        assert errors["quantized"][site] < 0.02 * errors["none"][site], (site, errors)
    assert sum(errors["float"].values()) < sum(errors["none"].values())


# --- the command line


def test_methods_lists_it(desk: Path, qtool_command: Command) -> None:
    ended = qtool_command("methods")
    assert ended.code == 0
    (line,) = [line for line in ended.out.splitlines() if line.strip().startswith("ibert")]
    assert "integer arithmetic" in line and "integers only" in line
    listed = json.loads(qtool_command("methods", "--json", "-").out)
    assert any("ibert" in json.dumps(item) for item in listed["methods"])
