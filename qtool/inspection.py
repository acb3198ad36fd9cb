"""What is inside an artifact, and whether it is still what was written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtool import artifact
from qtool.checkpoint import locate, tensor_infos, weight_files
from qtool.errors import InputError
from qtool.nn import parts_of


def inspect(model: str | Path, *, verify: bool = False, prove_integer: bool = False) -> dict[str, Any]:
    """JSON-clean: a row a quantized module, totals, and the outcome of every check that was asked for.

    Raises InputError when a proof fails, when `model` is not an artifact, its headers do not match its manifest, or
    what it says of itself is damaged.
    """
    folder = locate(model)
    config = _checked(folder)
    infos = tensor_infos(weight_files(folder))
    artifact.check_manifest(weight_files(folder), config["tensors"])
    report = artifact.report(folder) if (folder / artifact.REPORT).is_file() else {}
    figures = report.get("figures", {})
    described = [part for item in config["modules"].items() for part in parts_of(*item)]
    rows = [_row(path, module, infos, figures.get(path, {})) for path, module in described]
    size = artifact.size_on_disk(folder)
    source = report.get("source", {}).get("bytes")
    methods = config.get("methods")
    found = {
        "schema_version": 1,
        "path": str(folder),
        "architecture": report.get("architecture", "unknown"),
        "methods": [str(method) for method in methods] if isinstance(methods, list) else [],
        "execution": report.get("execution", {}).get("kind", "unknown"),
        "pruned_heads": artifact.pruned_heads(config),
        "modules": rows,
        "attention": [
            {"module": path, **item} for path, item in figures.items() if _number(item.get("mean_keys")) is not None
        ],
        "distilled": [found for item in figures.items() if (found := _distilled(*item))],
        "size_bytes": size,
        "percent_of_float": 100 * size / source if source else float("nan"),
        "kept_float": report.get("kept_float", {}),
        "scores": report.get("scores", []),
        "checks": {},
        "damage": [],
    }
    if verify:
        integer = bool(described) and all(module["type"].startswith("int_") for _, module in described)
        found["checks"], found["damage"] = _verify(folder, report, integer=integer)
    if prove_integer and not found["damage"]:
        from qtool.purity import prove

        found["checks"]["integer-only"] = prove(folder)
    return found


def _checked(folder: Path) -> dict[str, Any]:
    try:
        return artifact.checked_quantization(artifact.quantization_config(folder))
    except InputError as error:
        said = str(error)
        raise error if str(folder) in said else InputError(f"{folder}: {said}") from error


def _row(path: str, module: Mapping[str, Any], infos: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    own = [info for name, info in infos.items() if name.rpartition(".")[0] == path]
    integer = module["type"].startswith("int_")
    return {
        "path": path,
        "type": module["type"].replace("_", " "),
        "weights": str(module.get("weights", "shared" if "table" in module and not integer else "-")),
        "activations": str(module.get("activations", "integer" if integer else "float")),
        "bytes": sum(info.num_bytes for info in own),
        "sqnr": "-" if (sqnr := _number(figures.get("weight_sqnr_db"))) is None else f"{sqnr:.1f}",
        "output_sqnr_db": _number(figures.get("sqnr_db")),
        "saturated_percent": _number(figures.get("saturated_percent")),
        "spare_bits": _number(figures.get("spare_bits")),
    }


def _distilled(path: str, figures: Any) -> dict[str, Any] | None:
    """A block's loss on held-out batches before and after distillation; None for what was not distilled."""
    before, after = (_number(figures.get(key)) for key in ("lkd_before", "lkd_after"))
    if before is None or after is None:
        return None
    return {"block": path, "loss_before": before, "loss_after": after, "kept": after < before}


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) else None


def worst(figures: Mapping[str, Mapping[str, float]], count: int = 3) -> list[tuple[str, float]]:
    """The modules whose outputs are furthest from float's on the calibration data: path and SQNR in dB."""
    measured = [(path, found["sqnr_db"]) for path, found in figures.items() if "sqnr_db" in found]
    return sorted(measured, key=lambda item: item[1])[:count]


def _same_machine(fingerprint: Mapping[str, Any]) -> bool:
    """Whether this process rounds floats as the one that made the artifact."""
    import torch

    from qtool.job import BESIDE, instruction_set, versions

    made_on = str(fingerprint.get("instruction set")).partition(BESIDE)[0]  # golden outputs are the CPU's
    there = fingerprint.get("versions")
    return (
        made_on == instruction_set()
        and fingerprint.get("threads") == torch.get_num_threads()
        and isinstance(there, Mapping)
        and all(there.get(name) == version for name, version in versions().items())
    )


def _verify(folder: Path, report: Mapping[str, Any], *, integer: bool) -> tuple[dict[str, str], list[str]]:
    """Digests of tensors and files, then the golden batch. A re-saved model has no report: only its tensors count.

    An integer model must give the recorded bits on any machine.
    """
    from qtool import golden

    problems = [f"tensor {name} was changed" for name in artifact.damaged_tensors(folder)]
    checks = {"tensor digests": "changed" if problems else "intact"}
    if not report:
        checks["file digests"] = checks["golden batch"] = f"not recorded: no {artifact.REPORT}"
        return checks, problems
    files = [f"file {name} was changed or is missing" for name in artifact.damaged_files(folder)]
    checks["file digests"] = "changed" if files else "intact"
    problems += files
    if problems:
        checks["golden batch"] = "not computed: the files are damaged"
        return checks, problems
    try:
        exact = integer or _same_machine(report["fingerprint"])
        found = golden.recheck(folder, report["golden"], same_machine=exact)
    except InputError as error:
        checks["golden batch"] = "cannot be computed"
        return checks, [str(error)]
    checks["golden batch"] = found.verdict
    return checks, found.damage
