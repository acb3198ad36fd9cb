"""logattn's codes in the attention of other methods: ibert's integers, the same everywhere, and INT8 products."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig

import qtool
from qtool import audit, golden, kernels, pipeline, purity
from qtool.analysis.sweep import coded_bits
from qtool.errors import InputError
from qtool.inspection import inspect
from qtool.kernels.codebook import whole_edges
from qtool.nn import CodedAttention, QAttention
from qtool.nn.attention import QCodedAttention
from qtool.nn.integer.block import IntAttention, IntCodedAttention
from qtool.nn.integer.plan import IntPlan
from qtool.numerics.codebook import Codebook

ENCODERS = (
    "BertForSequenceClassification", "RobertaForQuestionAnswering", "DistilBertForMaskedLM",
    "ElectraForTokenClassification",
)  # fmt: skip
BERT = ENCODERS[0]
SHAPE: dict[str, Any] = {
    "vocab_size": 65, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40, "pad_token_id": 0, "initializer_range": 0.25,
}  # fmt: skip
DATA = ("calibration.source=random", "calibration.num_samples=8", "calibration.max_length=12")
SITES = tuple(f"bert.encoder.layer.{layer}.attention.self" for layer in range(2))
PAPER = {"mapping": "log", "levels": "midpoint", "relative": "false", "threshold": "0.02", "renormalize": "false"}
FORMS: dict[str, tuple[dict[str, Any], float]] = {  # options, and how far from probabilities they may be
    "calibrated": ({}, 0.15),
    "paper": (PAPER, 0.25),
    "pruned": ({"bits": "null", "threshold": "0.001"}, 0.002),
    "pruned, rows as they are": ({"bits": "null", "threshold": "0.001", "renormalize": "false"}, 0.002),
    **{
        f"eight bits, {relative=}, {renormalize=}": (
            # Absolute bins are those of the calibration data, whose rows are longer than some of these.
            {"bits": 8, "relative": relative, "renormalize": renormalize}, 0.01 if relative == "true" else 0.05,
        )
        for relative in ("true", "false") for renormalize in ("true", "false")
    },
}  # fmt: skip
ARITHMETIC = "integers only, from token ids to logits"
Made = Callable[..., Path]


@pytest.fixture(scope="module")
def made(shelf: Any) -> Made:
    """The artifact of a tiny model by class, methods and options, made once; its golden check runs in this process."""
    known: dict[Any, Path] = {}

    def check_here(run: Any, inputs: Any, outputs: Any) -> None:
        assert golden.differences(outputs, golden.compute(run.staging, inputs)) == []

    def make(architecture: str, *sets: str, methods: tuple[str, ...] = ("ibert", "logattn"), **options: Any) -> Path:
        sets += tuple(f"methods.logattn.{name}={value}" for name, value in options.items())
        key = (architecture, methods, *sets)
        if key not in known:
            torch.manual_seed(0)
            cls = getattr(transformers, architecture)
            source = shelf.folder / f"codes-{architecture}"
            sizes = {name: SHAPE[name] for name in ("num_attention_heads", "num_hidden_layers")}
            cls(cls.config_class(**{**SHAPE, **sizes})).eval().save_pretrained(source)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(shelf.folder)
                patch.setattr(pipeline, "_check_in_fresh_process", check_here)
                out = shelf.folder / f"codes-{len(known)}-out"
                known[key] = qtool.quantize(str(source), method=methods, output=out, set=(*DATA, *sets)).path
        return known[key]

    return make


def load(folder: Path) -> Any:
    architecture = AutoConfig.from_pretrained(folder).architectures[0]
    return getattr(transformers, architecture).from_pretrained(folder).eval()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 65, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 7:], mask[2, 3:] = 0, 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@torch.no_grad()
def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    found = model(**inputs)
    return torch.stack([found.start_logits, found.end_logits], -1) if "start_logits" in found else found.logits


def source_of(folder: Path) -> Path:
    return folder.parent / f"codes-{AutoConfig.from_pretrained(folder).architectures[0]}"


def attending(model: Any) -> dict[str, IntAttention]:
    return {path: module for path, module in model.named_modules() if isinstance(module, IntAttention)}


@pytest.mark.parametrize("architecture", ENCODERS)
def test_the_integers_are_the_same_everywhere_and_near_those_without_codes(made: Made, architecture: str) -> None:
    folder = made(architecture)
    network = load(folder)
    assert all(isinstance(module, IntCodedAttention) for module in attending(network).values())
    assert len(attending(network)) == 2
    inputs = batch()
    joined = outputs(network, inputs)
    if kernels.backend().name == "native":
        assert any(isinstance(module.__dict__.get("_plan"), IntPlan) for module in network.modules())
    with kernels.using("reference"):
        assert torch.equal(outputs(network, inputs), joined)
    alone = outputs(network, {name: value[1:2, :7] for name, value in inputs.items()})
    kept = joined[1:2] if alone.dim() == 2 else joined[1:2, :7]
    assert torch.equal(alone, kept)  # whatever else is in the batch, however much padding
    plain = outputs(load(made(architecture, methods=("ibert",))), inputs)
    real = inputs["attention_mask"].bool() if plain.dim() == 3 else slice(None)
    assert 0 < (plain - joined)[real].norm() < 0.3 * plain[real].norm()
    assert purity.prove(folder).startswith("proved: ")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_near_probabilities(made: Made, form: str) -> None:
    """On the queries, keys and values that the first block makes: those of an artifact without codes are the same."""
    options, bound = FORMS[form]
    # Values have no center where rows do not add up to one: then they have none in either model.
    sets = ("methods.ibert.centering=false",) if options.get("renormalize") == "false" else ()
    network, plain = load(made(BERT, *sets, **options)), load(made(BERT, *sets, methods=("ibert",)))
    inputs: list[torch.Tensor] = []
    module = network.get_submodule(SITES[0])
    hook = module.register_forward_pre_hook(lambda _, given: inputs.extend(given))
    with kernels.using("reference"):
        wanted = outputs(network, batch())
        hook.remove()
        found, other = module(*inputs).double(), plain.get_submodule(SITES[0])(*inputs).double()
    real = batch()["attention_mask"].bool()
    off = float((found - other)[real].norm() / other[real].norm())
    assert off < bound
    assert torch.equal(
        outputs(load(made(BERT, *sets, **options)), batch()), wanted
    )  # by native kernels, where they are


def test_codebooks_are_those_of_float_attention(made: Made) -> None:
    mine, other = load(made(BERT)), load(made(BERT, methods=("logattn",)))
    for site in SITES:
        module: Any = mine.get_submodule(site)
        codes = other.get_submodule(f"{site}.attention_codes")
        assert torch.equal(module.edges, whole_edges(codes.edges))
        ratio = module.levels[:, 1:] / codes.levels[:, 1:]
        assert ((ratio / ratio[:, -1:] - 1).abs() < 0.35).all()  # one digit: a small level is a few units
    paper: Any = load(made(BERT, **PAPER)).get_submodule(SITES[0])
    assert torch.equal(paper.edges, whole_edges(Codebook.log(3, 0.02).edges.expand(4, -1)))


@pytest.mark.parametrize("renormalize", ["true", "false"])
def test_values_have_a_center_where_rows_add_up_to_one(made: Made, renormalize: str) -> None:
    """Logits near those of float attention with the same codebooks, whose values are as they are."""
    options = {**PAPER, "renormalize": renormalize}
    found = outputs(load(made(BERT, "methods.ibert.bias_correction=none", **options)), batch())
    wanted = outputs(load(made(BERT, methods=("logattn",), **options)), batch())
    without = outputs(load(made(BERT, "methods.ibert.bias_correction=none", methods=("ibert",))), batch())
    plain = outputs(transformers.AutoModelForSequenceClassification.from_pretrained(source_of(made(BERT))), batch())
    # What integers cost is alike with codes and without.
    assert (found - wanted).norm() < 1.5 * (without - plain).norm()


def test_more_bits_than_codes_have_are_refused() -> None:
    words = {"heads": 1, "hidden": 4, "relative": True, "renormalize": True}
    with pytest.raises(InputError, match="have 2 to 8 bits, not 9"):
        IntCodedAttention({**words, "code_bits": 9}, device="meta")


def test_what_the_codes_could_overflow_is_audited(made: Made) -> None:
    for module in attending(load(made(BERT, bits=8))).values():
        bounds = {bound.what: bound for bound in module.bounds()}
        assert bounds["levels·V"].reaches == 127 * int(module.levels.max()) * 40
        assert all(bound.reaches <= bound.limit for bound in bounds.values())
        module.words["tokens"] = 1 << 20
        with pytest.raises(InputError, match="levels·V can reach"):
            audit.check({"attention": module})


def test_a_rule_leaves_a_block_its_probabilities(made: Made) -> None:
    network = load(made(BERT, f'rules={{"{SITES[0]}.attention_codes": "float"}}'))
    assert [type(module) for module in attending(network).values()] == [IntAttention, IntCodedAttention]
    folder = made(BERT, 'rules={"*.attention_codes": "float"}')
    assert json.loads((folder / "qtool.json").read_text())["execution"]["arithmetic"] == ARITHMETIC
    assert outputs(load(folder), batch()).equal(outputs(load(made(BERT, methods=("ibert",))), batch()))
    with pytest.raises(InputError, match=r"gives weights to .*attention_codes, which has none"):
        made(BERT, 'rules={"*.attention_codes": {"weights": "int8:channel:sym"}}')


def test_the_report_says_what_was_done(made: Made) -> None:
    folder = made(BERT)
    report = json.loads((folder / "qtool.json").read_text())
    assert report["execution"]["arithmetic"] == f"{ARITHMETIC}; attention probabilities in codes of 3 bits"
    assert coded_bits(str(folder)) == 3
    assert report["kept_float"] == {}
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    block = config["modules"]["bert.encoder.layer.0"]["parts"]["attention"]
    assert (block["type"], block["code_bits"], block["relative"]) == ("int_coded_attention", 3, True)
    assert [row["activations"] for row in inspect(folder)["modules"] if row["path"] == SITES[0]] == ["3-bit codes"]
    layer = report["figures"][SITES[0]]
    assert 0 < layer["zeros_percent"] < 100 and layer["mean_keys"] > 1 and layer["spare_bits"] >= 0


@pytest.mark.parametrize("architecture", [BERT, "LlamaForCausalLM"])
def test_int8_products_take_the_codes_too(made: Made, architecture: str) -> None:
    int8 = "methods.zeroquant.attention=int8"
    network = load(made(architecture, int8, methods=("zeroquant", "logattn")))
    modules = [module for module in network.modules() if isinstance(module, QAttention)]
    assert [type(module) for module in modules] == [QCodedAttention] * 2
    assert coded_bits(str(made(architecture, int8, methods=("zeroquant", "logattn")))) == 3
    assert not any(isinstance(module, CodedAttention) for module in network.modules())
    floats = load(made(architecture, methods=("logattn",)))
    books = [module for module in floats.modules() if isinstance(module, CodedAttention)]
    for module, book in zip(modules, books, strict=True):
        assert torch.equal(module.edges, whole_edges(book.edges))
    plain = outputs(load(made(architecture, int8, methods=("zeroquant",))), batch())
    found = outputs(network, batch())
    assert 0 < (found - plain).norm() < 0.3 * plain.norm()


def test_a_rule_takes_the_int8_products_away(made: Made) -> None:
    sets = ("methods.zeroquant.attention=int8", 'rules={"*.0.attention.self.int8_products": "float"}')
    network = load(made(BERT, *sets, methods=("zeroquant", "logattn")))
    kinds = (QAttention, CodedAttention)
    assert [type(m) for m in network.modules() if isinstance(m, kinds)] == [CodedAttention, QCodedAttention]
