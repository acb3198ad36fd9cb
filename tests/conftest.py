"""What every test stands on: no network, two threads, tiny random models, and real ones where the machine has them.

torch and transformers are imported where they are used: tests without models start at once.
"""

import copy
import ipaddress
import json
import os
import random
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRATCH_HOME = tempfile.mkdtemp(prefix="qtool-tests-hf-")

# Read by huggingface_hub, datasets and OpenMP when they are imported, here and in the processes that tests start.
os.environ.update(
    HF_DATASETS_OFFLINE="1",
    HF_EVALUATE_OFFLINE="1",
    HF_HOME=SCRATCH_HOME,
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="2",
    OMP_WAIT_POLICY="PASSIVE",  # on a busy machine, threads that spin for tiny products make tests five times slower
    PIP_NO_INDEX="1",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_OFFLINE="1",
)

if not Path("/dev/nvidiactl").exists():
    # Before anything imports triton, whose own functions are made for a GPU or to be interpreted when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"

# Two busy cores make single examples slow now and then: that is no finding. In CI the examples are the same every time.
hypothesis.settings.register_profile(
    "qtool",
    deadline=None,
    derandomize="CI" in os.environ,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("qtool")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")
    parser.addoption("--exhaustive", action="store_true", help="run every test, those that take minutes too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--exhaustive"):
        return
    unwanted = ("exhaustive",) if config.getoption("--slow") else ("slow", "exhaustive")
    left_out = [item for item in items if any(map(item.get_closest_marker, unwanted))]
    items[:] = [item for item in items if not any(map(item.get_closest_marker, unwanted))]
    config.hook.pytest_deselected(items=left_out)


def pytest_unconfigure() -> None:
    shutil.rmtree(SCRATCH_HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def test_models() -> Callable[[str], Path]:
    """The folder of a real model by name, such as `minilm-sst2`; the test is skipped where it was not assembled."""
    folder = Path(os.environ.get("QTOOL_TEST_MODELS") or Path.home() / ".cache" / "qtool-test-models").resolve()

    def find(name: str) -> Path:
        model = folder / name
        if not (model / "config.json").is_file():
            pytest.skip(f"no {name} in {folder}: python ../shared/models/assemble.py {name}")
        return model

    return find


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """The folder of a real data set by name, such as `sst2`; the test is skipped where it is absent."""
    folder = ROOT.parent / "shared" / "data"

    def find(name: str) -> Path:
        data = folder / name
        if not data.exists():
            pytest.skip(f"no {name} in {folder}")
        return data

    return find


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """A test that sets torch's thread count does not set it for the next one."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(2)


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Fail a test that looks up or connects to anything but this machine, even where the code swallows errors."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        _refuse_remote(address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        _refuse_remote(address)
        return connect_ex(self, address)

    def guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_remote((host,))
        return getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
        patch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
        yield


def _refuse_remote(address: Any) -> None:
    # Anything but a tuple is the path of a Unix socket.
    if isinstance(address, tuple) and not _is_local(address[0]):
        pytest.fail(f"this test tried to reach {address[0]}; tests use no network")


def _is_local(host: str | bytes | None) -> bool:
    name = host.decode() if isinstance(host, bytes) else host or "localhost"
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


WORDS = tuple(f"w{index}" for index in range(60))
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SHAPE: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "initializer_range": 0.4,
}


@dataclass(frozen=True)
class Zoo:
    """Makes models below `folder`."""

    folder: Path

    def make(
        self,
        name: str,
        architecture: str = "BertForSequenceClassification",
        *,
        seed: int = 0,
        labels: Sequence[str] = (),
        words: Sequence[str] | None = WORDS,
        change: Callable[[Any], None] | None = None,
        **options: Any,
    ) -> Path:
        """A folder with a random model and (unless `words` is None) a tokenizer of these words."""
        import torch
        import transformers

        model_class = getattr(transformers, architecture)
        named = {"id2label": dict(enumerate(labels)), "label2id": {x: i for i, x in enumerate(labels)}}
        torch.manual_seed(seed)
        model = model_class(model_class.config_class(**{**SHAPE, **options}, **(named if labels else {}))).eval()
        with torch.no_grad():
            if hasattr(model, "classifier") and architecture.endswith("ForSequenceClassification"):
                balance(model)
            if change is not None:
                change(model)
        model.save_pretrained(self.folder / name)
        if words is not None:
            tokenizer(words).save_pretrained(self.folder / name)
        return self.folder / name

    def causal(
        self, name: str, architecture: str = "GPT2LMHeadModel", *, bos: bool = False, left: bool = False, **options: Any
    ) -> Path:
        """A decoder whose tokenizer adds nothing to a text, or (`bos`) a token before it, and has no padding token
        unless it pads on the `left`."""
        folder = self.make(name, architecture, words=None, bos_token_id=2, eos_token_id=3, **options)
        causal_tokenizer(WORDS, bos, left).save_pretrained(folder)
        return folder

    def byte_level(self, name: str, architecture: str, text: str, **options: Any) -> Path:
        """A model with a tokenizer of bytes and some merges, as RoBERTa's; it knows the bytes of `text`."""
        folder = self.make(name, architecture, words=None, **options)
        byte_tokenizer(text).save_pretrained(folder)
        return folder

    def table(self, name: str, rows: Iterable[dict[str, Any]]) -> Path:
        """A jsonl file of any rows; folders are made."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def write(self, name: str, texts: Iterable[str], labels: Iterable[int | str]) -> Path:
        """A jsonl file with the columns `sentence` and `label`; folders are made."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = ({"sentence": text, "label": label} for text, label in zip(texts, labels, strict=True))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    @staticmethod
    def sentences(count: int, seed: int = 0) -> list[str]:
        """Random texts of 1 to 12 words."""
        draw = random.Random(seed)
        return [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(count)]

    @staticmethod
    def noise(scale: float) -> Callable[[Any], None]:
        """Noise on every parameter of a model: a stand-in for what quantization does."""

        import torch

        def change(model: Any) -> None:
            generator = torch.Generator().manual_seed(1)
            for weight in model.parameters():
                weight += scale * torch.randn(weight.shape, generator=generator)

        return change

    @staticmethod
    def plain(folder: Path, texts: Sequence[str | tuple[str, str]], tokens: int = 38) -> Any:
        """Logits (or last hidden states' plain mean) by plain transformers: one text a call, no padding."""
        import torch
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder)
        headed = config.architectures[0].endswith("ForSequenceClassification")
        loader = transformers.AutoModelForSequenceClassification if headed else transformers.AutoModel
        model, own = loader.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)
        rows = []
        with torch.no_grad():
            for text in texts:
                pair = (text,) if isinstance(text, str) else text
                out = model(**own(*pair, return_tensors="pt", truncation=True, max_length=tokens))
                rows.append(out.logits[0] if headed else out.last_hidden_state[0].mean(0))
        return torch.stack(rows)


def balance(model: Any) -> None:
    """Shift the head's bias so that random texts are spread over the classes."""
    import torch

    ids = torch.randint(len(SPECIAL), SHAPE["vocab_size"], (200, 8), generator=torch.Generator().manual_seed(0))
    head = getattr(model.classifier, "out_proj", model.classifier)
    head.bias -= model(input_ids=ids).logits.mean(0)


def tokenizer(words: Sequence[str]) -> Any:
    """A word-level tokenizer that knows these words and BERT's special tokens."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=inputs, **names)


def causal_tokenizer(words: Sequence[str], bos: bool, left: bool) -> Any:
    """A word-level tokenizer as decoders have it."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        made.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    names = {
        "unk_token": "[UNK]",
        "bos_token": "[CLS]",
        "eos_token": "[SEP]",
        **({"pad_token": "[PAD]"} if left else {}),
    }
    side = "left" if left else "right"
    inputs = ["input_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, model_input_names=inputs, padding_side=side, **names
    )


def byte_tokenizer(text: str) -> Any:
    """A byte-level BPE tokenizer trained on one text, special tokens placed as RoBERTa places them."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=SHAPE["vocab_size"], special_tokens=list(SPECIAL), show_progress=False)
    made.train_from_iterator([text], trainer)
    made.post_processor = processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2), add_prefix_space=False)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, model_input_names=["input_ids", "attention_mask"], **names
    )


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    """Models below this test's own folder."""
    return Zoo(tmp_path)


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Models that are made once and only read."""
    return Zoo(tmp_path_factory.mktemp("shelf"))


@pytest.fixture
def lesson(zoo: Zoo) -> Callable[..., AbstractContextManager[Any]]:
    """The first block of a random model, as methods that learn see it; its lowered inputs are float's, disturbed."""

    @contextmanager
    def make(
        architecture: str = "BertForSequenceClassification", *, batches: int = 25, **options: Any
    ) -> Iterator[Any]:
        import torch

        from qtool.api import calibration_batches, open_job, resolve_recipe
        from qtool.follow import Follower
        from qtool.stream import Stream

        decoder = "CausalLM" in architecture or "LMHead" in architecture
        if decoder:
            options.setdefault("initializer_range", 0.1)
        if "Llama" in architecture:
            options.setdefault("num_key_value_heads", 1)
        model = (zoo.causal if decoder else zoo.make)("float", architecture, change=zoo.noise(0.05), **options)
        texts = 4 * batches * (3 if decoder else 1)  # decoders read them in windows, without padding
        zoo.write("text.jsonl", zoo.sentences(texts), [0] * texts)
        flags = {"data": str(zoo.folder / "text.jsonl"), "batch_size": 4, "num_samples": 4 * batches, "max_length": 16}
        job = open_job(str(model), resolve_recipe(config="zeroquant-w8a8", model=str(model), flags=flags))
        exact, lowered = (Stream(copy.deepcopy(job.model), job.anatomy, job.checkpoint.tensor) for _ in range(2))
        follower = Follower(exact, lowered, calibration_batches(job).batches)
        with lowered.loaded(job.anatomy.embeddings):
            follower.advance(job.anatomy.embeddings)
        torch.manual_seed(0)
        with follower.lesson(job.anatomy.blocks[0]) as known:
            noisy = [replace(one, lowered=one.exact + 0.05 * torch.randn(one.exact.shape)) for one in known.examples]
            known.examples = noisy
            yield known

    return make


@dataclass(frozen=True)
class Tiny:
    """A random model with two classes, and a folder of data that it was (so to say) trained for."""

    model: Path
    data: Path


@pytest.fixture(scope="session")
def tiny(shelf: Zoo) -> Tiny:
    """Labels are the model's own answers but for every fifth; the two splits share no sentence."""
    model = shelf.make("tiny-sst2", labels=("negative", "positive"))
    texts = list(dict.fromkeys(shelf.sentences(120, seed=5)))
    answers = shelf.plain(model, texts).argmax(1).tolist()
    labels = [1 - answer if index % 5 == 0 else answer for index, answer in enumerate(answers)]
    shelf.write("tiny-data/train.jsonl", texts[:60], labels[:60])
    shelf.write("tiny-data/validation.jsonl", texts[60:], labels[60:])
    return Tiny(model, shelf.folder / "tiny-data")


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory. Golden checks run in this process: a fresh one imports torch for seconds."""
    from qtool import golden, pipeline
    from qtool.errors import QtoolError

    def check(run: Any, inputs: Any, outputs: Any) -> None:
        lines = golden.differences(outputs, golden.compute(run.staging, inputs))
        if lines:
            raise QtoolError("; ".join(lines))

    monkeypatch.setattr(pipeline, "_check_in_fresh_process", check)
    folder = tmp_path / "desk"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines that the command put on stderr to say why it failed."""
        return [line.removeprefix("qtool: ") for line in self.err.splitlines() if line.startswith("qtool: ")]


@pytest.fixture
def qtool_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Runs `qtool ARGUMENTS` in this process, as the console script does but for signals."""
    from qtool import cli

    def run(*arguments: Any) -> Ended:
        monkeypatch.setattr(sys, "argv", ["qtool", *map(str, arguments)])
        capsys.readouterr()
        code = cli._status()
        return Ended(code, *capsys.readouterr())

    return run
