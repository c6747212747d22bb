"""What every kind of data set is listed as: pairs, and what was skipped and why."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

NO_PICTURE, NO_PROMPT, EMPTY_PROMPT, BAD_TEXT = "no picture", "no prompt", "empty prompt", "prompt is not readable text"
NOT_A_PICTURE, BROKEN, BOMB, TOO_SMALL = "not a picture", "broken picture", "too many pixels", "too small"
MISSING, CUT_OFF, HOSTILE = "missing", "cut off", "refused member"
CHANGED, NOT_FINITE = "changed while it was read", "no finite numbers"


class DataError(ValueError):
    """The data set cannot be used; says what was found, what was expected and what to do."""


class Refused(DataError):
    """One picture or prompt cannot be used: `reason` is the kind that is counted, `detail` what is special."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


@dataclass(frozen=True, slots=True)
class Skip:
    """Something of a data set that is not used."""

    name: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {Refused(self.reason, self.detail)}"


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and its picture: a file, or `length` bytes from `start` of one; None where the teacher draws it."""

    picture: Path | None
    prompt: str
    name: str = ""
    start: int = 0
    length: int | None = None

    def read_bytes(self) -> bytes:
        """The picture file's content; raises Refused when it is gone or shorter than it was."""
        if self.picture is None:
            raise Refused(NOT_A_PICTURE, "a prompt without a picture")
        try:
            if self.length is None:
                return self.picture.read_bytes()
            with self.picture.open("rb") as file:
                file.seek(self.start)
                data = file.read(self.length)
        except OSError as error:
            raise Refused(MISSING, error.strerror or str(error)) from error
        if len(data) < self.length:
            raise Refused(CUT_OFF, f"{len(data)} of {self.length} bytes")
        return data


@dataclass
class Listing:
    """The pairs of a source in a fixed order; `wanted` says what was looked for."""

    source: str
    wanted: str
    pairs: list[Pair] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)

    def check(self) -> None:
        """Raise DataError when there is no pair."""
        if not self.pairs:
            raise DataError(
                f"{self.source} holds no usable pair ({count_reasons(self.skipped)} skipped); expected {self.wanted}"
            )


def name_source(source: Path | str) -> str:
    """A short name for what is kept about a source, which need not have a name in UTF-8."""
    return hashlib.sha256(os.fsencode(Path(source).resolve())).hexdigest()[:8]


def count_reasons(skipped: Iterable[Skip]) -> str:
    """A line such as `3 no prompt, 1 broken picture`."""
    counts = Counter(skip.reason for skip in skipped)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common()) or "none"
