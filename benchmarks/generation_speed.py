"""Tokens per second of `generate()`: quantized language models beside their float parent, in interleaved rounds.

    python benchmarks/generation_speed.py FLOAT QUANTIZED... [--rounds 7] [--tokens 32] [--threads 2] [--device cpu]
        [--dtype auto] [--json FILE]

Every round continues the same prompt of 32 random tokens greedily with each model in turn, with key/value cache. A
ratio is the median over rounds of float's seconds by the model's, of the same round; what else the machine does hits
both. On a GPU (`--device cuda`) events time the calls, and bytes of weights a second are set beside a copy's.
`--dtype` is that of the float model, as its config says by itself.
"""

import argparse
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import qtool  # noqa: F401 (teaches transformers to read quantized models)
from qtool.bench import gpu
from qtool.bench.clock import Clock, clock_for
from qtool.bench.peaks import measured
from qtool.bench.runtimes.weights import read_bytes
from qtool.device import usable
from qtool.errors import QtoolError
from qtool.kernels import native

PROMPT_TOKENS = 32


def seconds(model: Any, prompt: torch.Tensor, tokens: int, clock: Clock) -> float:
    """Of one greedy continuation."""

    def write() -> None:
        with torch.inference_mode():
            model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, min_new_tokens=tokens,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip

    return clock.took(write) / 1000


def main() -> None:
    """Print one JSON object, ratios first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("float", type=Path)
    parser.add_argument("quantized", type=Path, nargs="+")
    for name, default in (("rounds", 7), ("tokens", 32), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--json", type=Path)
    wanted = parser.parse_args()
    try:
        device = usable(wanted.device)
    except QtoolError as error:
        raise SystemExit(str(error)) from None
    torch.set_num_threads(wanted.threads)
    torch.set_float32_matmul_precision("highest")  # no TF32: what is called float32 is
    clock = clock_for(wanted.device)
    machine = about(device, clock)
    models = {
        folder: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
        for folder, dtype in ((wanted.float, wanted.dtype), *((folder, "auto") for folder in wanted.quantized))
    }
    vocabulary = min(model.config.vocab_size for model in models.values())
    prompt = torch.randint(0, vocabulary, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    for model in models.values():
        seconds(model, prompt, 4, clock)
    rounds = [
        {folder: seconds(model, prompt, wanted.tokens, clock) for folder, model in models.items()}
        for _ in range(wanted.rounds)
    ]
    bytes_read = {folder: read_bytes(model) for folder, model in models.items()}
    text = json.dumps(summary(rounds, bytes_read, wanted, machine), indent=2)
    print(text)
    if wanted.json:
        wanted.json.write_text(text + "\n")


def about(device: torch.device, clock: Clock) -> dict[str, Any]:
    """The machine: what it is, and what a GPU copies at most."""
    if device.type == "cuda":
        return {"gpu": gpu.describe(device), "peaks": measured(device, clock).to_json()}
    return {
        "cpu": platform.processor() or platform.machine(),
        "instruction_set": native.isa() if native.available() else "none",
        "cpu_flags": list(native.cpu_features()),
    }


def summary(
    rounds: list[dict[Path, float]], bytes_read: dict[Path, int], wanted: Any, machine: dict[str, Any]
) -> dict[str, Any]:
    """Medians of what each round took. Bytes a second are those of weights, read once a token."""
    middle = {folder: statistics.median(times[folder] for times in rounds) for folder in bytes_read}
    ratios = {
        folder.name: round(statistics.median(times[wanted.float] / times[folder] for times in rounds), 3)
        for folder in wanted.quantized
    }
    gigabytes = {folder.name: bytes_read[folder] * wanted.tokens / middle[folder] / 1e9 for folder in middle}
    found = {
        "times_as_fast_as_float": ratios,
        "tokens_a_second": {folder.name: round(wanted.tokens / middle[folder], 2) for folder in middle},
        "weights_gb_per_second": {name: round(value, 3) for name, value in gigabytes.items()},
    }
    if "peaks" in machine:
        copy = machine["peaks"]["copy_gb_per_second"]
        found["weights_of_copy"] = {name: round(value / copy, 4) for name, value in gigabytes.items()}
    settings = {name: getattr(wanted, name) for name in ("rounds", "tokens", "threads", "device", "dtype")}
    return {**found, **settings, **machine}


if __name__ == "__main__":
    main()
