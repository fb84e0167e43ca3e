"""The page: content, style and script in one HTML file, which fetches nothing and runs no other script."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from tsae.errors import UserError
from tsae.utils.atomic import WriteError, atomic_write

SCRIPTS = ("charts.js", "features.js", "passages.js", "view.js")  # concatenated in this order


def render(data: dict[str, Any]) -> str:
    """The page as text. data: from `tsae.view.data`; any text in it is shown and never interpreted."""
    style, script = _read("view.css"), "\n".join(_read(name) for name in SCRIPTS)
    # The browser runs this script and no other, should any of the data ever escape its element.
    policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'"
    return Template(_read("template.html")).substitute(
        title=html.escape(f"{data['run']['name']}: features over time"),
        policy=html.escape(policy),
        style=style,
        script=script,
        data=embedded(data),
    )


def embedded(data: Any) -> str:
    """JSON that cannot end its element: without ``<`` and other characters special to HTML or JavaScript."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # A lone surrogate, which a tokenizer may produce, cannot be encoded.
    return text.encode("utf-8", errors="replace").decode("utf-8")


def write_page(data: dict[str, Any], path: Path) -> int:
    """Write the page atomically; out: its size in bytes. Raises `UserError` if the file cannot be written."""
    text = render(data).encode("utf-8")
    try:
        with atomic_write(path) as temporary:
            temporary.write_bytes(text)
    except WriteError as error:
        raise cannot_write_page(path, error.reason) from None
    return len(text)


def cannot_write_page(path: Path, reason: str) -> UserError:
    """The error of a page that cannot be written, with the system's reason."""
    return UserError(f"The page cannot be written to {path} ({reason}); name another file with --out.")


def _read(name: str) -> str:
    return files("tsae.view").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii") + "'"
