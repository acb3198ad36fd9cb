"""Text that a model writes itself: against the float model's own softmax, computed by plain transformers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from scipy.stats import chisquare  # type: ignore[import-untyped]
from transformers.modeling_outputs import CausalLMOutput

from qtool.calibrate import generation
from qtool.calibrate.generation import GREEDY, GROUPS, SWEEPS, Alphabet, draw, refilled, written_by
from qtool.checkpoint import open_float
from qtool.errors import InputError
from qtool.stream import whole

MANY = 20_000
ORDINARY = torch.arange(5, 65)
PLAIN = Alphabet(ORDINARY)


def loaded(folder: Path) -> Any:
    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    return getattr(transformers, name).from_pretrained(folder).eval()


@pytest.fixture(scope="session")
def decoder(shelf: Any) -> Any:
    return loaded(shelf.causal("writes"))


@pytest.fixture(scope="session")
def encoder(shelf: Any) -> Any:
    return loaded(shelf.make("fills", "BertForMaskedLM"))


BERT = Alphabet(ORDINARY, prefix=(2,), suffix=(3,), mask=4)


def texts(model: Any, alphabet: Alphabet, *, seed: int = 0, count: int = 10, length: int = 12, size: int = 4) -> Any:
    masked = type(model).__name__.endswith("MaskedLM")
    sizes = {"num_samples": count, "batch_size": size, "max_length": length}
    return torch.cat(list(written_by(model, alphabet, masked=masked, seed=seed, **sizes)))


@torch.no_grad()
def chances(model: Any, ids: list[int], position: int) -> torch.Tensor:
    """The model's softmax at a position of one text, over ordinary tokens; float64 `[60]`."""
    found: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0, position, ORDINARY].double().softmax(-1)
    return found


def follows(drawn: torch.Tensor, expected: torch.Tensor) -> float:
    """The p-value of `drawn` ordinary tokens; seldom ones are counted together."""
    assert set(drawn.tolist()) <= set(ORDINARY.tolist())
    found = torch.bincount(drawn - 5, minlength=60).double()
    want = expected / expected.sum() * len(drawn)
    seldom = want < 10
    pooled = [torch.cat([x[~seldom], x[seldom].sum().view(-1)[: int(seldom.any())]]) for x in (found, want)]
    return float(chisquare(*pooled).pvalue)


# --- decoders


def test_a_first_token_is_drawn_from_the_softmax(decoder: Any) -> None:
    alphabet = replace(PLAIN, start=2)
    found = texts(decoder, alphabet, count=MANY, length=2, size=MANY)
    expected = chances(decoder, [2], 0)
    assert follows(found[:, 0], expected) > 0.001
    assert follows(found[:, 0], expected.roll(1)) < 1e-9, "the test sees a wrong distribution"
    first = int(found[:, 0].mode().values)
    second = found[found[:, 0] == first, 1]
    assert follows(second, chances(decoder, [2, first], 1)) > 0.001


def test_behind_random_first_tokens_come_the_likeliest_and_then_drawn_ones(decoder: Any) -> None:
    found = texts(decoder, PLAIN, count=1000, length=12, size=1000)
    uniform = torch.ones(60, dtype=torch.float64)
    assert follows(found[:, 0], uniform) > 0.001
    with torch.no_grad():
        logits = decoder(input_ids=found).logits[:, :, ORDINARY]
    likely = ORDINARY[logits.argmax(-1)][:, :-1] == found[:, 1:]
    assert likely[:, :GREEDY].all()
    assert 0.05 < likely[:, GREEDY:].float().mean() < 0.9


@pytest.mark.parametrize("alphabet", [PLAIN, replace(PLAIN, start=2), replace(PLAIN, prefix=(2,), suffix=(3, 3))])
def test_special_tokens_stand_around_a_text_and_never_in_it(decoder: Any, alphabet: Alphabet) -> None:
    found = texts(decoder, alphabet, count=30, length=38)
    before, after = len(alphabet.prefix), 38 - len(alphabet.suffix)
    assert found.shape == (30, 38) and found.dtype == torch.int64
    assert found[:, :before].tolist() == [list(alphabet.prefix)] * 30
    assert found[:, after:].tolist() == [list(alphabet.suffix)] * 30
    assert torch.isin(found[:, before:after], ORDINARY).all()
    assert len(set(map(tuple, found.tolist()))) == 30


def test_a_text_may_fill_all_positions_of_the_model(decoder: Any) -> None:
    assert texts(decoder, replace(PLAIN, start=2), count=2, length=40).shape == (2, 40)


@pytest.mark.parametrize("alphabet", [PLAIN, replace(PLAIN, prefix=(2,))])
def test_a_model_without_a_cache_writes_the_same(decoder: Any, alphabet: Alphabet) -> None:
    def forgets(input_ids: torch.Tensor, **_: Any) -> Any:
        return CausalLMOutput(logits=decoder(input_ids=input_ids, use_cache=False).logits)

    forgets.device = decoder.device  # type: ignore[attr-defined]
    assert torch.equal(texts(forgets, alphabet), texts(decoder, alphabet))


# --- masked models


def test_a_masked_token_is_drawn_from_the_softmax(encoder: Any) -> None:
    text = [2, 10, 11, 12, 13, 14, 3]
    ids = torch.tensor(text).expand(MANY, -1)
    positions = torch.full((MANY, 1), 3)
    found = refilled(encoder, ids, positions, BERT, torch.Generator().manual_seed(0))
    assert torch.equal(found[:, [0, 1, 2, 4, 5, 6]], ids[:, [0, 1, 2, 4, 5, 6]])
    expected = chances(encoder, [2, 10, 11, 4, 13, 14, 3], 3)
    assert follows(found[:, 3], expected) > 0.001
    assert follows(found[:, 3], chances(encoder, text, 3)) < 1e-9, "what stood there is not seen"


def test_positions_that_are_refilled_together_do_not_see_each_other(encoder: Any) -> None:
    ids = torch.tensor([2, 10, 11, 12, 13, 14, 3]).expand(MANY, -1)
    positions = torch.tensor([[4, 2]]).expand(MANY, -1)
    found = refilled(encoder, ids, positions, BERT, torch.Generator().manual_seed(1))
    for position in (2, 4):
        assert follows(found[:, position], chances(encoder, [2, 10, 4, 12, 4, 14, 3], position)) > 0.001


def test_masked_models_fill_all_between_the_special_tokens(encoder: Any) -> None:
    found = texts(encoder, BERT, count=9, length=20)
    assert found.shape == (9, 20)
    assert found[:, 0].tolist() == [2] * 9 and found[:, -1].tolist() == [3] * 9
    assert torch.isin(found[:, 1:-1], ORDINARY).all()
    assert len(set(map(tuple, found.tolist()))) == 9


@pytest.mark.parametrize("room", [1, 5, 21])
def test_a_sweep_draws_every_position_once(encoder: Any, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    plain = refilled

    def watched(model: Any, ids: torch.Tensor, positions: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(positions)
        return plain(model, ids, positions, *rest)

    monkeypatch.setattr(generation, "refilled", watched)
    texts(encoder, BERT, count=3, length=room + 2, size=3)
    steps = min(GROUPS, room)
    assert len(seen) == SWEEPS * steps
    for sweep in range(SWEEPS):
        visited = torch.cat(seen[sweep * steps : (sweep + 1) * steps], dim=1)
        assert visited.sort(dim=1).values.tolist() == [list(range(1, room + 1))] * 3
    orders = {tuple(row) for positions in zip(*seen, strict=True) for row in map(torch.Tensor.tolist, positions)}
    assert room < 5 or len(orders) > SWEEPS, "each text has orders of its own"


def test_logits_are_made_of_some_texts_at_a_time(encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_batch = texts(encoder, BERT, size=10)
    monkeypatch.setattr(generation, "LOGIT_BYTES", 3 * 12 * 65 * 4)
    sizes = set[int]()
    forward = encoder.forward

    def watched(**inputs: Any) -> Any:
        sizes.add(len(inputs["input_ids"]))
        return forward(**inputs)

    monkeypatch.setattr(encoder, "forward", watched)
    assert torch.equal(texts(encoder, BERT, size=10), whole_batch)
    assert sizes == {3, 1}


# --- both


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_the_seed_decides(kind: str, request: pytest.FixtureRequest) -> None:
    model, alphabet = request.getfixturevalue(kind), BERT if kind == "encoder" else PLAIN
    torch.manual_seed(1)
    found = texts(model, alphabet)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(texts(model, alphabet), found)
    assert torch.equal(torch.get_rng_state(), before), "torch's own generator is left alone"
    assert not torch.equal(texts(model, alphabet, seed=1), found)


@pytest.mark.parametrize("length", [1, 2])
def test_no_room_for_text(encoder: Any, length: int) -> None:
    with pytest.raises(InputError, match=f"maximum length of {length} leaves no room .* at least 3 with --max-length"):
        texts(encoder, BERT, length=length)


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.full((5000, 65), -torch.inf)
    logits[:, [7, 20]] = 0.0
    drawn = draw(logits, ORDINARY, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {7, 20}
    assert abs((drawn == 7).float().mean().item() - 0.5) < 0.03


# --- tokenizers and models


@pytest.mark.parametrize(("bos", "left"), [(False, False), (True, False), (True, True)])
def test_the_alphabet_of_a_decoder(zoo: Any, bos: bool, left: bool) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo.causal("m", bos=bos, left=left))
    found = Alphabet.of(tokenizer, 65)
    special = {1, 2, 3} | ({0} if left else set())  # [PAD] and [MASK] are plain words of such a tokenizer
    assert found.ordinary.tolist() == sorted(set(range(65)) - special)
    assert (found.prefix, found.suffix, found.start, found.mask) == ((2,) if bos else (), (), None, None)


def test_a_token_that_separates_texts_starts_them(zoo: Any) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo.causal("m"))
    tokenizer.bos_token = tokenizer.eos_token
    assert Alphabet.of(tokenizer, 65).start == 3


@pytest.mark.parametrize("vocabulary", [65, 30])
def test_the_alphabet_of_an_encoder(zoo: Any, vocabulary: int) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo.make("m"))
    found = Alphabet.of(tokenizer, vocabulary)
    assert found.ordinary.tolist() == list(range(5, vocabulary))
    assert (found.prefix, found.suffix, found.start, found.mask) == ((2,), (3,), None, 4)
    assert found.room(10) == 8


def test_marked_tokens_are_special_too(zoo: Any) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo.causal("m"))
    tokenizer.add_tokens([transformers.AddedToken("w9", special=True), transformers.AddedToken("<turn>", special=True)])
    ordinary = Alphabet.of(tokenizer, 70).ordinary.tolist()
    assert tokenizer.convert_tokens_to_ids("w9") not in ordinary
    assert tokenizer.convert_tokens_to_ids("<turn>") not in ordinary
    assert len(ordinary) == 65 - 3 - 1


def test_a_tokenizer_of_special_tokens_alone() -> None:
    fake = SimpleNamespace(added_tokens_decoder={}, all_special_ids=[0], get_vocab=lambda: {"[PAD]": 0})
    with pytest.raises(InputError, match="only special tokens"):
        Alphabet.of(fake, 1)


@pytest.mark.parametrize(("plain", "whole"), [([], [2, 3]), ([7], [2, 8, 3])])
def test_a_tokenizer_whose_own_tokens_cannot_be_told_apart(plain: list[int], whole: list[int]) -> None:
    class Fake(SimpleNamespace):
        def __call__(self, _: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": whole if add_special_tokens else plain}

    fake = Fake(added_tokens_decoder={}, all_special_ids=[2, 3], get_vocab=lambda: {"w7": 7})
    with pytest.raises(InputError, match="nobody can tell what the tokenizer puts around a text"):
        Alphabet.of(fake, 65)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "LlamaForCausalLM", "BertForMaskedLM"])
def test_a_whole_model_is_the_one_that_transformers_loads(architecture: str, tied: bool, zoo: Any) -> None:
    folder = zoo.make("m", architecture, words=None, tie_word_embeddings=tied)
    skeleton, checkpoint = open_float(folder)
    model, plain = whole(skeleton, checkpoint.tensor), loaded(folder)
    assert not model.training
    pairs = [(model.state_dict(), plain.state_dict()), (dict(model.named_buffers()), dict(plain.named_buffers()))]
    for own, theirs in pairs:
        assert own.keys() == theirs.keys()
        assert all(torch.equal(own[name], theirs[name]) for name in own)
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head.data_ptr() == table.data_ptr()) == tied
    ids = torch.randint(5, 65, (3, 7))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


# --- a real model


@pytest.mark.slow
def test_own_text_is_likely_to_the_model_and_random_tokens_are_not(test_models: Callable[[str], Path]) -> None:
    folder = test_models("tiny-gpt2-wikitext")
    model = loaded(folder)
    alphabet = Alphabet.of(transformers.AutoTokenizer.from_pretrained(folder), model.config.vocab_size)
    assert alphabet.start == 0 and len(alphabet.ordinary) == 4095
    own = texts(model, alphabet, count=16, length=64, size=16)
    scattered = torch.randint(1, 4096, own.shape, generator=torch.Generator().manual_seed(0))
    perplexities = []
    for ids in (own, scattered):
        with torch.no_grad():
            perplexities.append(model(input_ids=ids, labels=ids).loss.exp().item())
    assert perplexities[0] < 200 < 50 * perplexities[0] < perplexities[1]
    decoded = [transformers.AutoTokenizer.from_pretrained(folder).decode(row) for row in own]
    assert sum(" the " in text for text in decoded) > 12
