"""C identifiers for whatever tensors and layers are called."""

from __future__ import annotations

import re

from deploykit.hub.graph import take_name

LONGEST = 40
"""C99 promises 63 significant characters inside a file; suffixes and numbers need some."""

KEYWORDS = frozenset({
    "arena", "asm", "auto", "break", "case", "char", "const", "continue", "default", "do", "double", "else", "enum",
    "extern", "float", "for", "goto", "if", "inline", "int", "long", "main", "register", "restrict", "return", "short",
    "signed", "sizeof", "static", "struct", "switch", "typedef", "typeof", "union", "unsigned", "void", "volatile",
    "while",
})  # fmt: skip
"""C's, and what the generated code calls its own."""


def identifier(text: str, taken: set[str | None], front: str = "n") -> str:
    """A C identifier like ``text`` that nobody has taken; it is added to ``taken``.

    Characters C does not have become underscores, names that begin with a digit or an underscore (reserved) or are
    keywords get the letter ``front`` in front, and a second of the same name gets a number.
    """
    cleaned = re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")[:LONGEST].strip("_")
    if not cleaned or cleaned[0].isdigit() or cleaned in KEYWORDS or cleaned.lower().startswith(("dk_", "model_")):
        cleaned = f"{front}_{cleaned}".rstrip("_")
    return take_name(cleaned, taken)


def comment(text: str) -> str:
    """A name as it may stand in a C comment or string."""
    return re.sub(r'[^ -~]|[\\"?]|\*/', "_", text)
