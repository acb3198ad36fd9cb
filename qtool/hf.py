"""The transformers plug-in: `from_pretrained` of a qtool artifact gives a model of the usual class.

The only file that touches transformers' quantizer registry. Importing it registers the plug-in; `import qtool` arranges
for that. Modules are swapped while the model is on the meta device, so float weights are never materialised.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qtool import kernels, nn
from qtool.anatomy import FAMILIES, head_kind
from qtool.artifact import QUANT_METHOD, check_manifest, checked_quantization, manifest_of_tensors, pruned_heads
from qtool.decoder import join
from qtool.device import gpu_problem
from qtool.encoder import IntegerEncoder, integrate
from qtool.errors import InputError, UnavailableError
from qtool.fused import fuse
from qtool.nn import QAttention
from qtool.nn.attention import CHILD
from qtool.nn.codes import CODES_CHILD, CodedAttention
from qtool.nn.plan import check
from qtool.pruning import shrink
from qtool.recorded import record

REPEATABLE = "qtool_sdpa_float64"
"""Name of the attention that decoders of qtool use; see `repeatable_attention`."""
CODES = "qtool_codes"
"""Name of the attention that works on codes; see `coded_attention`."""
PLAIN = "qtool_plain"
"""Name of the attention that hands out its probabilities; see `plain_attention`."""
_PROBE = "qtool_probe"

_WITHOUT_MEANING = frozenset(
    {
        *("position_ids", "cache_position", "use_cache", "past_key_values", "return_dict", "deterministic"),
        *("output_attentions", "output_hidden_states", "is_causal", "sliding_window"),
    }
)
"""What attention functions are also given: known to them in other ways (the mask holds causality and windows), or
nothing that changes a number."""

_ATTENDING = ("attention", "coded_attention", "attention_codes")
"""Types of modules that attend."""

_PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")


@register_quantization_config(QUANT_METHOD)
class QtoolConfig(QuantizationConfigMixin):
    """`quantization_config` of an artifact's config.json.

    `modules` maps module paths to descriptions (`qtool.nn`); `tensors` is the manifest: name → [dtype, shape, digest].
    """

    def __init__(
        self,
        *,
        version: int | None = None,
        modules: Mapping[str, Mapping[str, Any]] | None = None,
        tensors: Mapping[str, list[Any]] | None = None,
        quant_method: str = QUANT_METHOD,
        **others: Any,
    ) -> None:
        """Raises InputError for an artifact of another format, or without what this one must have."""
        checked = checked_quantization({**others, "version": version, "modules": modules, "tensors": tensors})
        self.quant_method = quant_method  # type: ignore[assignment]
        self.version: int = checked["version"]
        self.modules: Mapping[str, Mapping[str, Any]] = dict(checked["modules"])
        self.tensors: Mapping[str, list[Any]] = dict(checked["tensors"])
        for name, value in others.items():  # kept for a re-save: methods, producer, and what later versions add
            setattr(self, name, value)


@register_quantizer(QUANT_METHOD)
class QtoolQuantizer(HfQuantizer):
    """Builds the quantized modules before loading, checks the files, and keeps the manifest true when saving."""

    quantization_config: QtoolConfig
    requires_calibration = True
    dtype: torch.dtype = torch.float32

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises UnavailableError for another device than the CPU or a GPU that can be used, and for several."""
        placed = device_map.values() if isinstance(device_map, dict) else [device_map]
        wanted = [_device_name(device) for device in placed if device not in (None, *_PLACEMENTS)]
        if len(set(wanted)) > 1:
            raise UnavailableError(
                f"device_map spreads a model over {', '.join(dict.fromkeys(wanted))}; one of qtool runs on one device: "
                'pass "cpu" or "cuda"'
            )
        for name in wanted:
            _check_device(name)

    def update_device_map(self, device_map: Any) -> Any:
        """`auto` and its like are torch's current GPU where one can be used, else the CPU."""
        if device_map not in _PLACEMENTS:
            return device_map
        return {"": "cpu" if gpu_problem() else torch.cuda.current_device()}

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Remembers what quantized modules are to return."""
        self.dtype = dtype
        return dtype

    def update_attn_implementation(self, config: Any) -> Any:
        """Raises InputError where another attention is asked for than the one that the artifact was made for."""
        wanted = config._attn_implementation
        described = self.quantization_config.modules.values()
        if wanted not in (None, CODES) and any(module["type"] in _ATTENDING for module in described):
            raise InputError(
                f"attn_implementation={wanted!r} cannot run this model, whose attention is quantized; leave it out"
            )
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if checkpoint_files:
            check_manifest([Path(file) for file in checkpoint_files], self.quantization_config.tensors)
        if gone := pruned_heads(vars(self.quantization_config)):
            shrink(model, gone)
        modules = paths_in(model, self.quantization_config.modules)
        _refuse_shared_tables(model, modules)
        _refuse_other_head(model, modules)
        adapt(model, modules, dtype=self.dtype)

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> list[Any]:
        """None: tensors of an artifact have the names of the modules, also where a float checkpoint uses others."""
        return []

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        # A base model inside a headed one may be saved on its own: its manifest has to be made then.
        for module in model.modules():
            if hasattr(module, "save_pretrained"):
                module.hf_quantizer = self
                module._weight_conversions = []  # or saving would rename tensors again

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """The manifest and the descriptions of the model as it is now: a base model taken out of a classifier, say."""
        self.quantization_config.modules = nn.describe(model)
        shared = getattr(model, "all_tied_weights_keys", None) or {}
        tensors = {name: value for name, value in model.state_dict().items() if name not in shared}
        self.quantization_config.tensors = manifest_of_tensors(tensors)
        return None, {}

    def is_serializable(self) -> bool:
        """`save_pretrained` works and is bit-exact."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Integer codes have no gradient; what is only smaller has."""
        return not self.quantization_config.modules


def _device_name(device: Any) -> str:
    """Of a device as a device_map may say it; a number is a GPU's."""
    return f"cuda:{device}" if isinstance(device, int) else str(device)


def _check_device(name: str) -> None:
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "meta", "cuda"):
        raise UnavailableError(f"device_map asks for {name}; qtool models run on the CPU or on an NVIDIA GPU")
    if kind == "cuda" and (problem := gpu_problem(int(number) if number else None)):
        raise UnavailableError(f"device_map asks for {name}: {problem}, or leave device_map out")


def adapt(model: Any, modules: Mapping[str, Mapping[str, Any]], *, dtype: torch.dtype) -> None:
    """Replace what `modules` describes by empty quantized modules, and give the model the forward they need."""
    if not modules:
        return
    nn.install(model, modules, dtype=dtype)
    repeatable_attention(model)
    coded_attention(model)
    integrate(model)
    fuse(model)
    join(model)
    if not isinstance(model, IntegerEncoder):
        record(model)


def _wide_sdpa(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **options: Any
) -> tuple[torch.Tensor, None]:
    """SDPA in float64: `[batch, heads, tokens, size]` in, `[batch, tokens, heads, size]` out."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if _one_query(query, key, value, mask, options):
        scaling = options.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return kernels.backend(query.device).wide_attention(query, key, value, mask, scaling), None
    wide = mask.double() if mask is not None and mask.is_floating_point() else mask
    out, _ = sdpa_attention_forward(module, query.double(), key.double(), value.double(), wide, **options)
    return out.to(query.dtype), None


def _one_query(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, options: Mapping[str, Any]
) -> bool:
    """Whether kernels of one query a head do it: a step with a cache, which waits for keys and values alone."""
    states = (query, key, value)
    if query.shape[2] != 1 or key.shape != value.shape or query.shape[1] % key.shape[1]:
        return False
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        return False
    if any(x.dtype != torch.float32 or x.is_meta or x.stride(-1) != 1 for x in states):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in states):
        return False
    if mask is not None and (mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[2:] != (1, key.shape[2])):
        return False
    if mask is not None and (mask.stride(-1) != 1 or mask.shape[1] not in (1, query.shape[1])):
        return False
    return not options.get("dropout") and not _unknown(options)


def repeatable_attention(model: Any) -> None:
    """Let a decoder's attention give the same numbers with a cache and without, in place of plain SDPA.

    In float32 the order of its sums depends on how many queries come at once. The last bits that differ flip activation
    codes in the next layer, these flip more, and a hard model soon says other words. In float64 the differences vanish
    when the result is rounded to float32.
    """
    # Not at the top: this file is imported while transformers itself is half imported.
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(REPEATABLE, _wide_sdpa)
    AttentionMaskInterface.register(REPEATABLE, sdpa_mask)
    family = FAMILIES.get(model.config.model_type)
    decoder = family.decoder if family else model.can_generate()
    if decoder and model._supports_attention_backend and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(REPEATABLE)


@dataclass(frozen=True)
class Site:
    """A module that calls the attention of the registry: its path, heads of queries and of keys, channels of a head."""

    path: str
    heads: int
    groups: int
    size: int


def attention_sites(model: Any) -> list[Site]:
    """The modules of a skeleton (meta device) that attend through transformers' registry, found by running it.

    Raises InputError for an architecture that has none, or whose attention is given what is not known.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    seen: dict[Any, tuple[int, int, int]] = {}

    def probe(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
    ) -> Any:
        _refuse_unknown(module, options)
        seen[module] = query.shape[1], key.shape[1], query.shape[3]
        if value.shape != key.shape:
            raise InputError(f"{type(module).__name__} has values of another size than keys; it stays float")
        return query.transpose(1, 2), None

    AttentionInterface.register(_PROBE, probe)
    AttentionMaskInterface.register(_PROBE, lambda *args, **options: None)
    name, before = type(model).__name__, model.config._attn_implementation
    if model._can_set_attn_implementation():
        model.set_attn_implementation(_PROBE)
        ids = torch.ones((1, 2), dtype=torch.int64, device="meta")
        try:
            with torch.no_grad():
                model(input_ids=ids, attention_mask=ids)
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"the attention of {name} cannot be looked at: {said}; it stays float") from error
        finally:
            model.set_attn_implementation(before)
    if not seen:
        raise InputError(
            f"{name} does not attend through transformers' registry of attention functions: its attention cannot be "
            "quantized"
        )
    paths = {module: path for path, module in model.named_modules()}
    return [Site(paths[module], *found) for module, found in seen.items()]


def coded_attention(model: Any) -> None:
    """Let attention modules that hold `QAttention` or `CodedAttention` attend by it, in place; others stay float.

    Raises InputError for a class that does not attend through transformers' registry.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    holders = [module for module in model.modules() if _attending(module) is not None]
    if not holders:
        return
    AttentionInterface.register(CODES, _attend)
    AttentionMaskInterface.register(CODES, _whole_mask)
    if model._can_set_attn_implementation():
        model.set_attn_implementation(CODES)
    if model.config._attn_implementation != CODES:
        raise InputError(
            f"{type(model).__name__} does not attend through transformers' registry of attention functions"
        )
    for module in holders:
        module.register_forward_pre_hook(_still_chosen)
        module.register_forward_hook(_was_called)


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`[batch, heads, tokens, size]` in; `[batch, tokens, heads, size]` and, where asked for, probabilities out."""
    operation = _attending(module)
    if operation is None:
        return _wide_sdpa(module, query, key, value, mask, **options)
    _refuse_unknown(module, options)
    if module.training and options.get("dropout"):
        raise InputError("attention on codes has no dropout and no gradient: call model.eval() first")
    causal = options.get("is_causal")
    if mask is None and query.shape[2] > 1 and (getattr(module, "is_causal", False) if causal is None else causal):
        raise InputError(f"{type(module).__name__} was given no causal mask: attention on codes cannot do without")
    context, codes = operation(query, key, value, mask, scaling=options.get("scaling"), softcap=options.get("softcap"))
    wanted = options.get("output_attentions", getattr(module.config, "output_attentions", False))
    return context, operation.values(codes) if wanted else None


def _attending(module: Any) -> QAttention | CodedAttention | None:
    """What an attention module holds to attend by."""
    found = (module._modules.get(CHILD), module._modules.get(CODES_CHILD))
    return next((child for child in found if isinstance(child, QAttention | CodedAttention)), None)


def plain_attention(change: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]) -> str:
    """Register an attention that is computed step by step, in float32, and return its name.

    `change` is given the module, its probabilities `[batch, heads, queries, keys]` and which keys a query sees (bool,
    broadcast to them; the others' probabilities are 0, also where a query sees none), and returns the probabilities
    that meet the values. A later call replaces an earlier one.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    def attend(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _refuse_unknown(module, options)
        groups = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(groups, 1) if groups > 1 else states for states in (key, value))
        scaling = options.get("scaling")
        scores = (query.float() @ key.float().mT).mul_(query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap := options.get("softcap"):
            scores = (scores / softcap).tanh_().mul_(softcap)
        seen = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=scores.device) if mask is None else mask
        scores.masked_fill_(~seen, -torch.inf)
        probabilities = scores.softmax(-1).masked_fill_(~seen, 0)  # a query that sees nobody would have NaN
        kept = change(module, probabilities, seen)
        return (kept.to(value.dtype) @ value).transpose(1, 2), kept

    AttentionInterface.register(PLAIN, attend)
    AttentionMaskInterface.register(PLAIN, _whole_mask)
    return PLAIN


def _unknown(options: Mapping[str, Any]) -> list[str]:
    """Options that may change the result in ways that are not known."""
    known = {"scaling", "dropout", *_WITHOUT_MEANING}
    return sorted(name for name, value in options.items() if value is not None and name not in known)


def _refuse_unknown(module: Any, options: Mapping[str, Any]) -> None:
    """What is not understood could change the result. Raises InputError naming it."""
    unknown = _unknown({name: value for name, value in options.items() if name != "softcap"})
    if unknown:
        raise InputError(f"{type(module).__name__} passes {', '.join(unknown)}, which qtool's attention does not know")


def _whole_mask(*args: Any, **options: Any) -> torch.Tensor | None:
    """SDPA's boolean mask, also where SDPA would be told `is_causal` instead; None where everybody sees all.

    On a GPU one would have to wait for that, and a recorded forward, which cannot, needs the kernels of its first call:
    a mask of tokens is not looked at.
    """
    from transformers.masking_utils import sdpa_mask

    asked = {**options, "allow_is_causal_skip": False}
    tokens = options.get("attention_mask")
    if isinstance(tokens, torch.Tensor) and kernels.backend(tokens.device).name == "triton":
        asked["allow_is_bidirectional_skip"] = False
    mask: torch.Tensor | None = sdpa_mask(*args, **asked)
    return mask


@check
def _still_chosen(module: Any, args: Any) -> None:
    chosen = module.config._attn_implementation
    if chosen != CODES:
        raise InputError(f"attention {chosen!r} was set, and this model's is quantized; set {CODES!r} again")


@check
def _was_called(module: Any, args: Any, output: Any) -> None:
    operation = _attending(module)
    if operation is not None and not operation.calls:
        raise InputError(f"{type(module).__name__} did not call its attention on codes; please report this")


def paths_in(model: Any, modules: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """`modules` under the paths that they have in `model`, which may be the base or a headed class of the saved one.

    A head that `model` does not have is left out; any other module that is missing is an InputError.
    """
    prefix = f"{model.base_model_prefix}."
    known = {name for name, _ in model.named_modules()}
    headed = any(path.startswith(prefix) for path in modules)

    def here(path: str) -> str | None:
        candidates = (path, path.removeprefix(prefix), prefix + path)
        return next((p for p in candidates if p in known or _owner(p) in known), None)

    found: dict[str, Mapping[str, Any]] = {}
    for path, description in modules.items():
        target = here(path)
        if target is not None:
            found[target] = _retabled(model, description, here)
        elif not headed or path.startswith(prefix):
            raise InputError(f"{type(model).__name__} has no module {path}, which the artifact quantizes")
    return found


def _owner(path: str) -> str:
    """The module of the float model that holds `path`, where qtool adds a child to it."""
    owner, _, name = path.rpartition(".")
    return owner if name in (CHILD, CODES_CHILD) else path


def _retabled(model: Any, description: Mapping[str, Any], here: Callable[[str], str | None]) -> Mapping[str, Any]:
    """A description whose shared table is named by its path in `model`. Raises InputError when it is nowhere."""
    changes: dict[str, Any] = {}
    if "table" in description:
        changes["table"] = here(description["table"])
        if changes["table"] is None:
            raise InputError(f"{type(model).__name__} has no table {description['table']}, which the artifact shares")
    if "parts" in description:
        changes["parts"] = {role: _retabled(model, part, here) for role, part in description["parts"].items()}
    return {**description, **changes}


def _refuse_other_head(model: Any, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """An integer head computes what its class does, also where another class has a module of its name.

    Raises InputError for a class that would take it for its own.
    """
    saved, here = (model.config.architectures or [""])[0], type(model).__name__
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    taken = [path for path, item in modules.items() if item["type"].startswith("int_") and not path.startswith(prefix)]
    if taken and saved and head_kind(saved) != head_kind(here):
        raise InputError(f"{here} cannot take over {taken[0]} of {saved}; load it as that class, or as AutoModel")


def _refuse_shared_tables(model: Any, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """A quantized table and a float output layer cannot share a tensor: transformers would copy codes over it.

    Raises InputError for a class with such a layer; the class that was quantized has none.
    """
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if any(source.startswith(f"{path}.") for path in modules):
            raise InputError(
                f"{type(model).__name__} shares {target} with an embedding table that is quantized in this artifact; "
                "load it as the class in its config.json, or as AutoModel"
            )
