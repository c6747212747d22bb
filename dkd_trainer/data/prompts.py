"""Prompts as text: what a caption file may hold, and a file of prompts alone, one a line."""

import codecs
from pathlib import Path

from .source import BAD_TEXT, EMPTY_PROMPT, MISSING, DataError, Listing, Pair, Refused, Skip

LONGEST = 64 * 1024  # bytes; the text encoder reads 77 tokens


def decode_text(data: bytes) -> str:
    """UTF-8 with or without a byte-order mark, or UTF-16 with one; raises Refused for anything else."""
    utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(BAD_TEXT, f"not UTF-8 at byte {error.start}; save it as UTF-8") from error
    if "\0" in text:
        raise Refused(BAD_TEXT, "it holds zero bytes")
    return text


def decode_prompt(data: bytes) -> str:
    """The prompt that a caption file holds; raises Refused when there is none."""
    if len(data) > LONGEST:
        raise Refused(BAD_TEXT, f"{len(data)} bytes, expected at most {LONGEST}")
    if not (prompt := decode_text(data).strip()):
        raise Refused(EMPTY_PROMPT)
    return prompt


def read_prompt(path: Path) -> str:
    """The prompt of a caption file; raises Refused."""
    try:
        with path.open("rb") as file:
            return decode_prompt(file.read(LONGEST + 1))
    except OSError as error:
        raise Refused(MISSING, f"{path.name}: {error.strerror}") from error


def list_prompts(path: Path) -> Listing:
    """Every line of a text file as a prompt that the teacher draws a picture for; raises DataError."""
    listing = Listing(path.name, "one prompt a line, in UTF-8")
    for number, line in enumerate(read_lines(path), start=1):
        try:
            listing.pairs.append(Pair(None, decode_prompt(line), f"line {number}"))
        except Refused as refused:
            listing.skipped.append(Skip(f"line {number}", refused.reason, refused.detail))
    return listing


def read_lines(path: Path) -> list[bytes]:
    """The lines of a text file, each as UTF-8 bytes; a line in another encoding does not spoil the others."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"the prompts in {path} cannot be read: {error.strerror}") from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        data = decode_text(data).encode()
    return data.splitlines()
