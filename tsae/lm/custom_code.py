"""Code that comes with a model: a modeling file in its folder or repository, which loading the model would run."""

from __future__ import annotations

import logging
from typing import Any

from tsae.errors import UserError

log = logging.getLogger(__name__)


def needs_trust(error: Exception) -> bool:
    """Whether ``error`` is transformers' refusal to run a model's own code."""
    return isinstance(error, ValueError) and "trust_remote_code" in str(error)


def refusal(source: str, options: dict[str, Any]) -> UserError:
    """The error that names the code which loading ``source`` would run, and how to allow it.

    options: for reading the model's files
    """
    from transformers import PreTrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    found: dict[str, None] = {}  # in order, each once
    for read in (lambda: PreTrainedConfig.get_config_dict(source, **options)[0], lambda: get_tokenizer_config(source)):
        try:
            found |= dict.fromkeys(classes(read()))
        except OSError:  # a file that is not there names no code
            continue
    named = ", ".join(found) or "which its files name"
    return UserError(
        f"the model {source!r} comes with code of its own ({named}), which loading it would run: read that code, and "
        "allow it with --trust-remote-code if you trust it"
    )


def classes(values: dict[str, Any]) -> list[str]:
    """The classes of a configuration's `auto_map`, such as `modeling_own.py: OwnForCausalLM`, each once.

    values: the content of config.json or tokenizer_config.json
    """
    entries = values.get("auto_map") or {}
    if not isinstance(entries, dict):  # a tokenizer's, of older versions
        entries = {"AutoTokenizer": entries}
    named = [each for entry in entries.values() for each in (entry if isinstance(entry, (list, tuple)) else [entry])]
    out = []
    for reference in named:
        if isinstance(reference, str) and "." in reference:
            repository, _, path = reference.rpartition("--")
            module, _, name = path.rpartition(".")
            out.append(f"{repository + '/' if repository else ''}{module.replace('.', '/')}.py: {name}")
    return list(dict.fromkeys(out))


def warn_of_unused(source: str, given: dict[str, Any], model: object) -> None:
    """Warn that ``source`` comes with code that is not run, since transformers has a class of its own for it.

    given: the content of config.json
    """
    if named := classes(given):
        log.warning(
            "%s comes with code of its own (%s), not run without --trust-remote-code; transformers' %s is used",
            source,
            ", ".join(named),
            type(model).__name__,
        )
