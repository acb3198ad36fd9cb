"""The proof that a model is integer-only: it holds for every head, and falls at the first float, wherever it is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qtool
from qtool import golden, kernels
from qtool.errors import InputError
from qtool.inspection import inspect
from qtool.kernels import native, reference
from qtool.kernels.integer import Native
from qtool.nn import IntModule
from qtool.nn.integer.activation import IntTable, IntTanh
from qtool.nn.integer.block import IntAttention, IntBlock
from qtool.nn.integer.embedding import IntEmbeddings, IntTableRows
from qtool.nn.integer.linear import IntLinear
from qtool.nn.integer.norm import IntNorm
from qtool.purity import IntegerOnly, prove, run_guarded

SEQUENCE, TOKENS, ANSWERS, MASKED = (
    f"For{head}" for head in ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM")
)
BERT = f"Bert{SEQUENCE}"
QUICK = [BERT, f"Bert{MASKED}", f"Roberta{SEQUENCE}", f"DistilBert{ANSWERS}", f"Electra{TOKENS}"]
EVERY = [
    f"{family}{head}"
    for family in ("Bert", "Roberta", "DistilBert", "Electra")
    for head in (SEQUENCE, TOKENS, ANSWERS, MASKED, "Model")
]
Made = Callable[..., Path]


@pytest.fixture(scope="module")
def made(shelf: Any) -> Made:
    """The artifact of a tiny model by architecture, method and recipe entries, made once."""
    found: dict[Any, Path] = {}

    def make(architecture: str, *sets: str, method: str = "ibert", **options: Any) -> Path:
        key = (architecture, method, *sets, *options)
        if key not in found:
            name = f"purity-{len(found)}"
            source = shelf.make(name, architecture, change=shelf.noise(0.1), **options)
            entries = ["calibration.source=random", "calibration.num_samples=4", *sets]
            entries += (
                ["methods.ibert.tuning=2"] if method == "ibert" and "methods.ibert.smoothing=null" not in sets else []
            )
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(shelf.folder)
                patch.setattr("qtool.pipeline._check_in_fresh_process", lambda *run: None)
                output = shelf.folder / f"{name}-out"
                found[key] = qtool.quantize(str(source), method=method, output=output, set=entries).path
        return found[key]

    return make


@pytest.mark.parametrize(
    "architecture", [*QUICK, *(pytest.param(x, marks=pytest.mark.slow) for x in EVERY if x not in QUICK)]
)
def test_every_head_is_integer_only(made: Made, architecture: str) -> None:
    said = prove(made(architecture))
    words = said.split()
    assert words[0] == "proved:" and int(words[1]) > 200 and "none of which touches a float" in said


@pytest.mark.parametrize(
    "sets",
    [
        ("methods.ibert.gelu=polynomial",),
        ("activations=int8:tensor:sym",),
        pytest.param(("methods.ibert.smoothing=null", "methods.ibert.centering=false"), marks=pytest.mark.slow),
    ],
)
def test_other_recipes_are_integer_only(made: Made, sets: tuple[str, ...]) -> None:
    assert prove(made(BERT, *sets)).startswith("proved: ")


def test_a_folder_that_was_saved_again_is_proved_without_a_report(made: Made, tmp_path: Path) -> None:
    golden.load(made(f"Roberta{SEQUENCE}")).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "qtool.json").exists()
    assert prove(tmp_path / "saved").startswith("proved: ")
    assert inspect(tmp_path / "saved", prove_integer=True)["checks"].keys() == {"integer-only"}


def test_what_leaves_the_guarded_run_is_what_users_get_before_the_last_scaling(made: Made) -> None:
    model = golden.load(made(BERT))
    inputs = {"input_ids": torch.arange(12).view(2, 6)}
    with kernels.using("reference"):  # whose operations the guard sees
        integers, operations = run_guarded(model, inputs)
    with torch.inference_mode():
        floats = model(**inputs).logits
    assert list(integers) == ["logits"] and operations > 200
    assert torch.equal(
        floats.double(), (integers["logits"].double() * 2.0 ** -model.classifier.exponent.item()).float()
    )


# The first float


def through_float(forward: Any) -> Any:
    return lambda self, *inputs: forward(self, *inputs).float().int()


def with_a_float_factor(forward: Any) -> Any:
    return lambda self, *inputs: (forward(self, *inputs) * 1.0).int()


def through_complex(forward: Any) -> Any:
    return lambda self, *inputs: torch.view_as_real(forward(self, *inputs).to(torch.complex64))[..., 0].int()


def divided(forward: Any) -> Any:
    return lambda self, *inputs: (forward(self, *inputs) / 1).int()


def with_a_float_beside_it(forward: Any) -> Any:
    """Integers are right, and a float was made on the way."""

    def run(self: Any, *inputs: Any) -> Any:
        torch.zeros(3)
        return forward(self, *inputs)

    return run


LOSSES = [
    (through_float, r"(_to_copy|to)\.\w+ touches torch\.float32 \["),
    (with_a_float_factor, r"mul\.\w+ touches torch\.float32 \["),
    (through_complex, r"(_to_copy|to)\.\w+ touches torch\.complex64 \["),
    (divided, r"div\.\w+ touches torch\.float32 \["),
    (with_a_float_beside_it, r"zeros\.default touches torch\.float32 \[3\]"),
]
MODULES = [IntTableRows, IntNorm, IntLinear, IntAttention, IntTable, IntTanh, IntBlock, IntEmbeddings]


@pytest.mark.parametrize(
    ("module", "change", "operation"),
    [*((IntLinear, *loss) for loss in LOSSES), *((module, *LOSSES[0]) for module in MODULES if module != IntLinear)],
)
def test_a_module_that_goes_through_floats_is_named_by_its_operation(
    made: Made, monkeypatch: pytest.MonkeyPatch, module: type[IntModule], change: Any, operation: str
) -> None:
    monkeypatch.setattr(module, "forward", change(module.forward))
    with pytest.raises(InputError, match=rf"^not integer-only: aten\.{operation}") as error:
        prove(made(BERT))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("function", ["isqrt", "integer_softmax", "quantize_rows", "saturate", "integer_tanh"])
def test_a_kernel_that_goes_through_floats_is_found(made: Made, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    original = getattr(reference, function)

    def changed(x: torch.Tensor, *others: Any, **options: Any) -> Any:
        return original(x.double().to(x.dtype), *others, **options)

    monkeypatch.setattr(reference, function, changed)
    if hasattr(reference.Reference, function):
        monkeypatch.setattr(reference.Reference, function, staticmethod(changed))
    with pytest.raises(InputError, match=r"aten\.(_to_copy|to)\.\w+ touches torch\.float64"):
        prove(made(BERT))


def test_a_float_inside_a_composite_operation_is_found(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = IntNorm.forward

    def compare(self: Any, x: torch.Tensor) -> torch.Tensor:
        torch.isclose(x, x)  # integers in, booleans out, float32 within
        return forward(self, x)

    monkeypatch.setattr(IntNorm, "forward", compare)
    with pytest.raises(InputError, match=r"touches torch\.float32"):
        prove(made(BERT))


def test_an_output_of_another_integer_type_is_no_proof(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = IntLinear.forward
    monkeypatch.setattr(
        IntLinear, "forward", lambda self, x: forward(self, x).long() if self.output else forward(self, x)
    )
    with pytest.raises(InputError, match=r"not integer-only: logits is torch\.int64, not int32"):
        prove(made(BERT))


@pytest.mark.parametrize("kind", ["buffer", "parameter", "anchor of another module"])
def test_a_float_tensor_that_nothing_reads_is_named(made: Made, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    load = golden.load

    def with_a_float(folder: Path) -> Any:
        model = load(folder)
        norm = model.bert.encoder.layer[1].output.LayerNorm
        tensor = torch.ones(1, dtype=torch.float16)
        if kind == "buffer":
            norm.register_buffer("spare", tensor)
        else:
            name = "spare" if kind == "parameter" else "anchor"
            norm.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        return model

    monkeypatch.setattr(golden, "load", with_a_float)
    name = "anchor" if kind.startswith("anchor") else "spare"
    with pytest.raises(InputError, match=rf"float tensors such as bert\.encoder\.layer\.1\.output\.LayerNorm\.{name}$"):
        prove(made(BERT))


@pytest.mark.parametrize("label", ["zeroquant", "float"])
def test_models_with_float_tensors_are_not_integer_only(made: Made, label: str) -> None:
    folder = made(BERT, method="zeroquant")
    folder = folder if label == "zeroquant" else folder.with_name(folder.name.removesuffix("-out"))
    with pytest.raises(InputError, match="is not integer-only: it holds float tensors such as bert"):
        prove(folder)


def test_another_backend_must_give_the_same_integers(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.available():
        pytest.skip(str(native.reason()))
    with kernels.using("native"):
        assert f"the native kernels ({native.isa()}) give the same integers" in prove(made(BERT))
        encoder = Native.integer_encoder
        monkeypatch.setattr(Native, "integer_encoder", staticmethod(lambda *given: encoder(*given).roll(1, -1)))
        with pytest.raises(InputError, match=r"the native backend's .* differs from the reference's"):
            prove(made(BERT))


# The guard itself


def test_the_guard_lets_integers_and_booleans_pass_and_counts() -> None:
    x = torch.arange(6)
    with IntegerOnly() as guard:
        y = torch.cat([x, x.int()]).view(3, 4) > 2
        torch.where(y, 1, 0).sum()
    assert guard.operations >= 4


@pytest.mark.parametrize(
    "operation",
    [
        lambda x, f: x.add(f),
        lambda x, f: torch.cat([x, f.new_empty(0, dtype=torch.long)]),
        lambda x, f: torch.stack([x[0], f[0]]),
        lambda x, f: torch.where(x > 2, x, f),
        lambda x, f: torch._foreach_copy_([x], [f]),
        lambda x, f: f.argmax(),
        lambda x, f: x.sqrt(),
        lambda x, f: torch.full_like(x, 2, dtype=torch.bfloat16),
        lambda x, f: x.to(torch.complex64),
        lambda x, f: torch.equal(f, f),
        lambda x, f: f.view(torch.int32),
    ],
)
def test_the_guard_stops_at_operands_and_results(operation: Any) -> None:
    x, f = torch.arange(1, 5), torch.ones(4)
    with pytest.raises(InputError, match="not integer-only: aten"), IntegerOnly():
        operation(x, f)
    operation(x.float(), f)  # which is fine outside


# The command


def test_the_command_says_what_was_proved(made: Made, qtool_command: Any) -> None:
    ended = qtool_command("inspect", made(BERT), "--prove-integer")
    assert ended.code == 0 and ended.errors == []
    shown = " ".join(ended.out.split())
    assert "integer-only" in shown and "proved" in shown


def test_the_command_gives_the_proof_as_json(made: Made, qtool_command: Any) -> None:
    ended = qtool_command("inspect", made(BERT), "--prove-integer", "--verify", "--json", "-")
    checks = json.loads(ended.out)["checks"]
    assert ended.code == 0 and checks["integer-only"] == prove(made(BERT))
    assert checks["golden batch"] == "agrees" and checks["tensor digests"] == "intact"
    assert "integer-only" not in json.loads(qtool_command("inspect", made(BERT), "--json", "-").out)["checks"]


def test_the_command_ends_with_3_and_one_line_at_a_float(made: Made, qtool_command: Any) -> None:
    ended = qtool_command("inspect", made(BERT, method="zeroquant"), "--prove-integer")
    assert ended.code == 3
    assert len(ended.errors) == 1 and "is not integer-only: it holds float tensors such as bert" in ended.errors[0]


def test_a_damaged_artifact_is_not_run(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtool.purity.prove", lambda folder: pytest.fail("damage comes first"))
    monkeypatch.setattr("qtool.artifact.damaged_tensors", lambda folder: ["classifier.weight"])
    found = inspect(made(BERT), verify=True, prove_integer=True)
    assert found["damage"] == ["tensor classifier.weight was changed"] and "integer-only" not in found["checks"]
