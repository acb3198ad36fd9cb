"""Every preset of zeroquant on decoders: it quantizes, loads, and generates the same with a cache and without."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qtool.recipe import presets

DECODERS: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {},
    "LlamaForCausalLM": {"num_key_value_heads": 1},
    "GPTNeoXForCausalLM": {},
}
NAMES = [name for name in presets() if name.startswith("zeroquant")]


def test_there_is_one_for_each_mode() -> None:
    assert {"w8a8", "w4a8", "w4a16", "w8a8-full"} <= {name.removeprefix("zeroquant-") for name in NAMES}


@pytest.mark.parametrize("preset", NAMES)
@pytest.mark.parametrize("architecture", DECODERS)
def test_generate_with_and_without_cache(
    architecture: str, preset: str, zoo: Any, desk: Path, qtool_command: Callable[..., Any]
) -> None:
    """Greedy tokens of prompts padded to the left."""
    size = {"hidden_size": 64, "intermediate_size": 128, **DECODERS[architecture]}
    model = zoo.causal("float", architecture, left=True, **size)
    calibration = ("--set", "calibration.source=random", "--num-samples", "8", "--max-length", "16")
    ended = qtool_command("quantize", model, "-c", preset, *calibration, "-o", "out")
    assert ended.code == 0, ended.err
    loaded = AutoModelForCausalLM.from_pretrained("out").eval()
    ids = torch.randint(5, 65, (3, 9), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(ids)
    ids[1, :4], real[1, :4] = 0, 0
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, uncached = (
        loaded.generate(input_ids=ids, attention_mask=real, **options, use_cache=cache) for cache in (True, False)
    )
    assert cached.shape == (3, 17) and torch.equal(cached, uncached)
