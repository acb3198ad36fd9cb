"""How much sooner several ranks are done than one, beside what the machine itself gives to so many processes.

    python benchmarks/ranks.py MODEL --task TASK --data DATA [--ranks 2] [--rounds 3] [--samples 256] [--steps 100]
        [--limit N] [--json FILE]

Each rank has one thread. In every round each command runs on one rank and on all, with the processes of a matrix
product in between: one alone, then as many as ranks at once, each with as much to do. A speed-up is the median over
rounds of one rank's seconds by those of all; the machine's is ranks · alone / together. `work` leaves out the seconds
that a command takes to begin and to publish, measured by the same command with next to nothing to do. Results of both
must be the same bytes, or nothing is reported.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qtool.bench.machine import describe, load_average

PRODUCT = """
import sys, time
import torch
torch.set_num_threads(1)
a, b = torch.randn(768, 768), torch.randn(768, 768)
a @ b
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[1])):
    a @ b
"""


def products(count: int, repeats: int) -> float:
    """Seconds of `count` processes that each multiply matrices so often, at once."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PRODUCT, str(repeats)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(count)
    ]
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
    started = time.perf_counter()
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.close()
    for child in children:
        child.wait()
    return time.perf_counter() - started


def command(arguments: Sequence[str], ranks: int, folder: Path) -> float:
    """Seconds of a command of qtool."""
    jobs = ["--jobs", str(ranks)] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, "-m", "qtool", *arguments, "--threads", "1", *jobs],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if ended.returncode:
        sys.exit(ended.stderr)
    return time.perf_counter() - started


def result(file: Path) -> Any:
    """What of an output must not depend on the number of ranks."""
    if file.is_dir():
        return (file / "model.safetensors").read_bytes(), (file / "config.json").read_bytes()
    if file.suffix != ".json":
        return file.read_bytes()
    body = json.loads(file.read_text("utf-8"))
    return body["candidate"]["score"], body.get("predictions")


def ways(wanted: argparse.Namespace, small: bool) -> dict[str, Callable[[str], list[str]]]:
    """Command lines by what they do, for an output; `small` ones have next to nothing to do."""
    data = ["--task", wanted.task, "--data", str(wanted.data.resolve())]
    model = str(wanted.model.resolve())
    samples = ["--num-samples", "2" if small else str(wanted.samples), "--batch-size", "1" if small else "16"]
    limit = ["--limit", "2"] if small else ["--limit", str(wanted.limit)] if wanted.limit else []
    steps = f"methods.zeroquant.lkd.steps={1 if small else wanted.steps}"
    learning = ["-c", "zeroquant-w8a8", "--set", "methods.zeroquant.lkd=true", "--set", steps]
    return {
        "eval": lambda out: ["eval", model, *data, "--batch-size", "16", *limit, "--json", f"{out}.json"],
        "calibrate": lambda out: ["calibrate", model, "--method", "ibert", *data, *samples, "-o", out],
        "quantize with LKD": lambda out: ["quantize", model, *learning, *data, *samples, "-o", out],
    }


def measured(wanted: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, float]]]:
    """Seconds of each round by what is measured."""
    found: dict[str, list[dict[str, float]]] = {"machine": [], **{name: [] for name in ways(wanted, False)}}
    repeats = max(1, round(200 * 5.0 / products(1, 200)))
    for number in range(wanted.rounds):
        for name, arguments in ways(wanted, False).items():
            row = {}
            for ranks in (1, wanted.ranks):
                out = f"{name.split()[0]}-{number}-{ranks}"
                row[str(ranks)] = command(arguments(out), ranks, folder)
                small = ways(wanted, True)[name]
                row[f"{ranks} begin"] = command(small(f"{out}-small"), ranks, folder)
            outs = [folder / f"{name.split()[0]}-{number}-{ranks}" for ranks in (1, wanted.ranks)]
            results = [result(out if out.exists() else out.with_suffix(".json")) for out in outs]
            if results[0] != results[1]:
                sys.exit(f"{name}: {wanted.ranks} ranks gave something else than one")
            found[name].append(row)
            alone, together = products(1, repeats), products(wanted.ranks, repeats)
            found["machine"].append({"1": alone, str(wanted.ranks): together})
    return found


def report(wanted: argparse.Namespace, found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of ratios, first."""
    many = str(wanted.ranks)
    machine_gives = statistics.median(wanted.ranks * row["1"] / row[many] for row in found["machine"])
    rows = {}
    for name, rounds in found.items():
        if name == "machine":
            continue
        whole = statistics.median(row["1"] / row[many] for row in rounds)
        work = statistics.median((row["1"] - row["1 begin"]) / (row[many] - row[f"{many} begin"]) for row in rounds)
        rows[name] = {
            "speed-up": round(whole, 3),
            "speed-up of the work": round(work, 3),
            "of the machine's": round(work / machine_gives, 3),
            "seconds on one": round(statistics.median(row["1"] for row in rounds), 1),
            f"seconds on {many}": round(statistics.median(row[many] for row in rounds), 1),
        }
    return {"machine gives": round(machine_gives, 3), **rows, "rounds": found, "machine": describe(load_average())}


def main() -> None:
    """Print one JSON object, ratios first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--task", required=True)
    parser.add_argument("--data", type=Path, required=True)
    for name, default in (("ranks", 2), ("rounds", 3), ("samples", 256), ("steps", 100), ("limit", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps(report(wanted, measured(wanted, Path(folder))), indent=2)
    print(text)
    if wanted.json:
        wanted.json.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
