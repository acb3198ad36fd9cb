"""Tokens per second of `generate()`: quantized language models beside their float parent, in interleaved rounds.

    python benchmarks/generation_speed.py FLOAT QUANTIZED... [--rounds 7] [--tokens 32] [--threads 2] [--json FILE]

Every round continues the same prompt of 32 random tokens greedily with each model in turn, with key/value cache. A
ratio is the median over rounds of float's seconds by the model's, of the same round; what else the machine does hits
both.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import qtool  # noqa: F401 (teaches transformers to read quantized models)
from qtool.kernels import native

PROMPT_TOKENS = 32


def seconds(model: Any, prompt: torch.Tensor, tokens: int) -> float:
    """Of one greedy continuation."""
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, min_new_tokens=tokens,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
    return time.perf_counter() - start


def main() -> None:
    """Print one JSON object, ratios first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("float", type=Path)
    parser.add_argument("quantized", type=Path, nargs="+")
    for name, default in (("rounds", 7), ("tokens", 32), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    wanted = parser.parse_args()
    torch.set_num_threads(wanted.threads)
    models = {
        folder: AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (wanted.float, *wanted.quantized)
    }
    vocabulary = min(model.config.vocab_size for model in models.values())
    prompt = torch.randint(0, vocabulary, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    for model in models.values():
        seconds(model, prompt, 4)
    rounds = [
        {folder: seconds(model, prompt, wanted.tokens) for folder, model in models.items()}
        for _ in range(wanted.rounds)
    ]
    text = json.dumps(summary(rounds, wanted), indent=2)
    print(text)
    if wanted.json:
        wanted.json.write_text(text + "\n")


def summary(rounds: list[dict[Path, float]], wanted: Any) -> dict[str, Any]:
    """Medians of what each round took."""
    ratios = {
        folder.name: round(statistics.median(times[wanted.float] / times[folder] for times in rounds), 3)
        for folder in wanted.quantized
    }
    speeds = {
        folder.name: round(wanted.tokens / statistics.median(times[folder] for times in rounds), 2)
        for folder in (wanted.float, *wanted.quantized)
    }
    return {
        "times_as_fast_as_float": ratios,
        "tokens_a_second": speeds,
        "rounds": wanted.rounds,
        "tokens": wanted.tokens,
        "threads": wanted.threads,
        "cpu": platform.processor() or platform.machine(),
        "instruction_set": native.isa() if native.available() else "none",
        "cpu_flags": list(native.cpu_features()),
    }


if __name__ == "__main__":
    main()
