"""Loading transformers language models: from the hub, a local folder, or the packages of the demo models."""

from __future__ import annotations

import json
import logging
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from tsae.errors import UserError, reason
from tsae.lm.blocks import find_blocks
from tsae.lm.context import context_limit
from tsae.lm.custom_code import needs_trust, refusal, warn_of_unused
from tsae.lm.gemma_package import GEMMA
from tsae.lm.placement import input_device, own_quantization, placement_options
from tsae.lm.smollm_package import SMOLLM
from tsae.lm.tokenizer import declines_bos, fit_to_model, is_empty, prefix_token
from tsae.lm.weights import check_weights
from tsae.utils.hub import hub_is_reachable
from tsae.utils.notices import warn_once
from tsae.utils.paths import expanded

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from tsae.lm.hook_points import HookPoint
    from tsae.lm.site import Site

PACKAGED = {model.name: model for model in (GEMMA, SMOLLM)}
"""The demo models, by name."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Numbers of a configuration that no weight's shape depends on.
_NOT_IN_SHAPES = ("num_attention_heads", "query_pre_attn_scalar")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass
class LanguageModel:
    """A frozen decoder and its tokenizer.

    model: in evaluation mode; no parameter requires a gradient.
    name: as given to `load_language_model`, for records and messages.
    dtype, device: of its weights and activations.
    prepend_bos: whether sequences start with BOS, or EOS in its place, if the tokenizer has one.
    widths: width of each place that `tsae.lm.trial_run.site_width` has measured; by its number for a block's output.
    points: the modules of each place that `tsae.lm.hook_points.find` has found.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    dtype: torch.dtype
    device: torch.device
    prepend_bos: bool = True
    widths: dict[int | Site, int] = field(default_factory=dict, repr=False, compare=False)
    points: dict[Site, HookPoint] = field(default_factory=dict, repr=False, compare=False)

    def __repr__(self) -> str:
        where = f"{self.n_layers} layers, {self.dtype}, {self.device}"
        return f"LanguageModel({self.name!r}): {type(self.model).__name__}, {where}"

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, in order."""
        return find_blocks(self.model)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @cached_property
    def context(self) -> int | None:
        """The most tokens it takes at once; None if nothing limits them."""
        return context_limit(self.model)

    @property
    def embedding_rows(self) -> int | None:
        """How many ids it has an embedding for; None if it has no table of them."""
        return _embedding_rows(self.model)

    @property
    def prefix_id(self) -> int | None:
        """The token that starts every sequence (`tsae.lm.tokenizer.prefix_token`); None: its first token of text."""
        return prefix_token(self.tokenizer) if self.prepend_bos else None

    def generate(self, prompt: str, max_new_tokens: int = 40, **options: Any) -> str:
        """The model's continuation of a prompt, greedy unless ``options`` ask for samples; see `tsae.lm.generation`."""
        from tsae.lm.generation import generate

        return generate(self, prompt, max_new_tokens, **options)


def _embedding_rows(model: nn.Module) -> int | None:
    table = cast(Any, model).get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(table, "weight", None)
    return None if weight is None else weight.shape[0]


def default_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 on hardware that multiplies it faster than float32, otherwise float32.

    Emulated bfloat16 is many times slower. CPUs that qualify have AMX, or AVX-512 and are not Intel's: without AMX
    those multiply bfloat16 at about half the speed of float32 (76 and 138 GFLOP/s on one core of a Xeon).
    """
    kind = torch.device(device).type
    if kind == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu":
        fast = torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and not _is_intel())
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


def _is_intel() -> bool:
    """Whether the CPU is Intel's; False if unknown."""
    if platform.system() != "Linux":
        return "Intel" in platform.processor()
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def load_language_model(
    name: str,
    *,
    device: torch.device | str = "cpu",
    dtype: str = "auto",
    revision: str | None = None,
    device_map: str = "none",
    quantization: str = "none",
    trust_remote_code: bool = False,
    prepend_bos: bool | None = None,
) -> LanguageModel:
    """Load a language model and its tokenizer.

    name: one of `PACKAGED` (converted once and cached), a local folder, or a hub id.
    dtype: "float32", "bfloat16", "float16", or "auto" for `default_dtype`.
    revision: branch, tag or commit of a hub model.
    device_map: how accelerate divides it among all GPUs (`tsae.lm.placement.DeviceMap`), instead of ``device``.
    quantization: "8bit" or "4bit" (NF4): quantize its linear layers with bitsandbytes.
    trust_remote_code: run the code that comes with a model which transformers has no class for.
    prepend_bos: whether sequences start with BOS, if the tokenizer has one; None: unless the model
        was trained without (`tsae.lm.tokenizer.declines_bos`).
    Raises UserError if the model does not exist or is incomplete, if the device or dtype does not exist, if a package
    for its placement is missing, or if it comes with code that is not trusted.
    """
    device = _usable_device(device)
    if dtype != "auto" and dtype not in _DTYPES:
        raise UserError(f"dtype must be auto, {', '.join(_DTYPES)}, not {dtype!r}")
    torch_dtype = default_dtype(device) if dtype == "auto" else _DTYPES[dtype]

    path = expanded(name)
    if name in PACKAGED:
        source = str(PACKAGED[name].folder())
    elif name and path.is_dir():
        source = str(path)
    elif not name or path.exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise UserError(f"no model at {name!r}: expected a folder with a model in it, or the id of a hub model")
    else:
        source = name
    placed = partial(
        placement_options, device=device, dtype=torch_dtype, device_map=device_map, quantization=quantization
    )
    hub = source == name and not path.is_dir()
    model, tokenizer = _load(source, torch_dtype, revision, placed, hub=hub, trusted=trust_remote_code)
    if prepend_bos is None:
        prepend_bos = not declines_bos(tokenizer, _declared_bos(source, revision))
        if not prepend_bos:
            warn_once(
                log,
                f"the tokenizer of {name!r} adds no BOS (add_bos_token is false): every sequence starts with text, "
                "whose first token is not trained on",
            )
    model.requires_grad_(False).eval()
    if device_map != "none":
        device = input_device(model)
    elif getattr(model, "hf_device_map", None) is None:
        cast(nn.Module, model).to(device)
    return LanguageModel(model, tokenizer, name, torch_dtype, device, prepend_bos)


def absolute_name(name: str) -> str:
    """The model's name in a form that is valid in every working directory."""
    path = expanded(name)
    return str(path.absolute()) if name and name not in PACKAGED and path.is_dir() else name


def _load(
    source: str,
    dtype: torch.dtype,
    revision: str | None,
    placed: Callable[[str, dict[str, Any]], dict[str, Any]],
    *,
    hub: bool,
    trusted: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoConfig, AutoTokenizer

    local_only = not hub or not hub_is_reachable()
    options: dict[str, Any] = {"local_files_only": local_only, "revision": revision or "main"}
    tokenizer: PreTrainedTokenizerBase | None = None
    failed: Exception | None = None
    try:
        with _quiet(bar=hub):
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trusted, **options)
    except Exception as error:
        if needs_trust(error):
            raise refusal(source, options) from error
        failed = error
    if not hub:
        _check_folder(Path(source), tokenizer, failed)
    try:
        if failed is not None:
            raise failed
        with _quiet(bar=hub):
            config = AutoConfig.from_pretrained(source, trust_remote_code=trusted, **options)
            given, _ = type(config).get_config_dict(source, **options)
            more: dict[str, Any] = {"attn_implementation": "eager"} if _caps_attention_scores(config) else {}
            more |= placed(source, given)
            if trusted and "auto_map" in given:
                more["trust_remote_code"] = True
            loaded: Any = _auto_class(config, given, trusted=trusted).from_pretrained(
                source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options, **more
            )
            model, found = loaded
    except UserError:
        raise
    except Exception as error:  # each library raises its own kind for damaged files
        if needs_trust(error):
            raise refusal(source, options) from error
        if hub and local_only:
            raise UserError(
                f"cannot load the model {source!r}: the Hugging Face hub cannot be reached and the model is "
                "not in its cache, so connect to the network or name a local folder"
            ) from error
        raise UserError(f"cannot load the model {source!r}: {reason(error)}") from error
    if tokenizer is None or is_empty(tokenizer):
        raise UserError(f"cannot load the model {source!r}: it has no tokenizer")
    if not trusted:
        warn_of_unused(source, given, model)
    check_weights(model, found, source, quantized=own_quantization(given) is not None)
    _name_defaults(config, given, source)
    bos = getattr(config.get_text_config(decoder=True), "bos_token_id", None)
    fit_to_model(tokenizer, _embedding_rows(model), bos, source)
    return model, tokenizer


def _auto_class(config: PreTrainedConfig, given: dict[str, Any], *, trusted: bool) -> Any:
    """The class of transformers that loads the model: with a head for the next token, and with images if it takes them.

    given: the content of config.json
    """
    import transformers

    causal = transformers.AutoModelForCausalLM
    if (trusted and "AutoModelForCausalLM" in (given.get("auto_map") or {})) or type(config) in causal._model_mapping:
        return causal
    for name in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        multimodal = getattr(transformers, name, None)
        if multimodal is not None and type(config) in multimodal._model_mapping:
            return multimodal
    return causal


def _declared_bos(source: str, revision: str | None) -> object:
    """`add_bos_token` in the tokenizer_config.json of a model that has been loaded; None if it is not there."""
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    return get_tokenizer_config(source, local_files_only=True, revision=revision or "main").get("add_bos_token")


def _name_defaults(config: PreTrainedConfig, given: dict[str, Any], source: str) -> None:
    """Warn of numbers that the weights' shapes do not tell, if config.json leaves them to the defaults of its class.

    given: the content of config.json
    """
    text = config.get_text_config(decoder=True)
    nested = [value for value in given.values() if isinstance(value, dict)]
    for name in _NOT_IN_SHAPES:
        names = {name, text.attribute_map.get(name, name)}
        value = getattr(text, name, None)
        if value is not None and not any(names & each.keys() for each in (given, *nested)):
            log.warning("%s: its config.json gives no %s; taken as %s", source, name, value)


def _caps_attention_scores(config: PreTrainedConfig) -> bool:
    """Whether the model soft-caps its attention scores (Gemma 2), which transformers' sdpa code leaves out.

    Some versions of transformers (5.17) select sdpa for such a model all the same.
    """
    return getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None


@contextmanager
def _quiet(*, bar: bool) -> Iterator[None]:
    """Silence transformers' table of missing weights, which `check_weights` reports, and without ``bar`` its progress.

    A local model loads in seconds and needs no progress bar; a download keeps it.
    """
    from transformers.utils import logging as hf_logging

    verbosity, shown = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    if not bar:
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if shown:
            hf_logging.enable_progress_bar()


def _check_folder(folder: Path, tokenizer: PreTrainedTokenizerBase | None, failed: Exception | None) -> None:
    """Raise UserError naming what a folder lacks.

    tokenizer, failed: what transformers found in the folder, or its error: it decides which files are a tokenizer
    """
    missing = []
    if not (folder / "config.json").is_file():
        missing.append("config.json")
    if not any((*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin"))):
        missing.append("weights (model.safetensors)")
    missing.extend(_missing_shards(folder))
    has_files = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    if (failed is not None and not has_files) or (tokenizer is not None and is_empty(tokenizer)):
        missing.append("a tokenizer (tokenizer.json)")
    if missing:
        raise UserError(
            f"the model folder {str(folder)!r} lacks {' and '.join(missing)}: "
            "expected what save_pretrained writes for a model and its tokenizer"
        )


def _missing_shards(folder: Path) -> list[str]:
    """The files that weights in several files lack: those that their index names, or the index itself."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return []
    if not index.is_file():
        shards = [path for path in folder.glob("*.safetensors") if re.search(r"-\d+-of-\d+$", path.stem)]
        return [f"{index.name}, which says what is in its {len(shards)} files of weights"] if shards else []
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, LookupError, AttributeError, TypeError):
        return []  # transformers reports what is wrong with it
    lost = [name for name in names if not (folder / str(name)).is_file()]
    return [f"{lost[0]} ({len(lost)} of {len(names)} files of weights)"] if lost else []


def _usable_device(device: torch.device | str) -> torch.device:
    """The device. Raises UserError unless it can compute."""
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()  # fails on "meta"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = re.split(r"\.\s|\n", str(error).strip())[0]  # PyTorch says several sentences
        raise UserError(f"the device {str(device)!r} cannot be used: {first}") from error
    return found
