"""How long a quantized language model writes what its float parent writes, and whether the cache changes anything.

    python benchmarks/generation.py FLOAT QUANTIZED TEXT.txt [--prompts 20] [--tokens 16] [--json FILE]

Prompts are the first 32 tokens of the paragraphs of a text file. Each is continued greedily by both models, with and
without key/value cache; milliseconds are medians over prompts, models in turn.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qtool  # noqa: F401 (teaches transformers to read the quantized model)

PROMPT_TOKENS = 32


def prompts(tokenizer: Any, text: Path, count: int) -> list[torch.Tensor]:
    """Token ids `[1, 32]` from the starts of the first paragraphs that are long enough."""
    lines = [line for line in text.read_text("utf-8").splitlines() if line.strip() and not line.startswith(" =")]
    ids = (tokenizer(line, return_tensors="pt").input_ids[:, :PROMPT_TOKENS] for line in lines)
    whole = [row for row in ids if row.shape[1] == PROMPT_TOKENS]
    return whole[:count]


def continued(model: Any, prompt: torch.Tensor, tokens: int, cache: bool) -> tuple[list[int], float]:
    """Greedy continuation and its seconds."""
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, min_new_tokens=tokens,
            do_sample=False, use_cache=cache, pad_token_id=0,
        )  # fmt: skip
    return out[0, prompt.shape[1] :].tolist(), time.perf_counter() - start


def prefix(one: list[int], other: list[int]) -> int:
    """Equal tokens before the first difference."""
    pairs = zip(one, other, strict=True)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), len(one))


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("float", "quantized", "text"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--json", type=Path)
    wanted = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(wanted.float)
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (wanted.float, wanted.quantized)]
    rows = [
        [[continued(model, prompt, wanted.tokens, cache) for cache in (True, False)] for model in models]
        for prompt in prompts(tokenizer, wanted.text, wanted.prompts)
    ]
    text = json.dumps(summary(rows, wanted.tokens), indent=2)
    print(text)
    if wanted.json:
        wanted.json.write_text(text + "\n")


def summary(rows: list[Any], tokens: int) -> dict[str, Any]:
    """From `rows[prompt][model][cache]`, each the tokens and seconds of a continuation."""
    names = ("float", "quantized")
    pairs = [(theirs[0][0], own[0][0]) for theirs, own in rows]
    equal = [a == b for theirs, own in pairs for a, b in zip(theirs, own, strict=True)]
    cached = {name: sum(runs[side][0][0] == runs[side][1][0] for runs in rows) for side, name in enumerate(names)}
    times = {
        f"{name}, {how}": round(1000 * statistics.median(runs[side][cache][1] for runs in rows) / tokens, 2)
        for side, name in enumerate(names)
        for cache, how in enumerate(("cached", "uncached"))
    }
    return {
        "prompts": len(rows),
        "tokens": tokens,
        "same_continuation": sum(theirs == own for theirs, own in pairs),
        "same_tokens_percent": 100 * statistics.mean(equal),
        "mean_equal_prefix": statistics.mean(prefix(theirs, own) for theirs, own in pairs),
        "cached_equals_uncached": cached,
        "ms_a_token": times,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
