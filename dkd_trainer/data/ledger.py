"""What is known of picture files without reading them again: hash and size, by path and time of change."""

import logging
import os
import sqlite3
import time
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

from .source import Pair

COLUMNS = "place TEXT PRIMARY KEY, stamp TEXT, digest TEXT, width INTEGER, height INTEGER, reason TEXT, detail TEXT"

YOUNG = 2_000_000_000  # ns; two changes within a tick of the file system's clock leave one time


@dataclass(frozen=True, slots=True)
class Look:
    """What reading a picture file's header told: its content's hash and upright pixels, or why it is refused."""

    digest: str
    width: int = 0
    height: int = 0
    reason: str = ""
    detail: str = ""


class Ledger:
    """Looks by file, in SQLite: safe against kills, shared by processes, and only a memory aid.

    Where the database cannot be used (a network folder without locks, a damaged file) every picture is looked at anew.
    """

    def __init__(self, path: Path):
        self.database: sqlite3.Connection | None = None
        try:
            self.database = sqlite3.connect(path, timeout=60)
            self.database.execute(f"CREATE TABLE IF NOT EXISTS looks ({COLUMNS})")
            self.database.commit()
        except sqlite3.Error as error:
            self.give_up(error)

    def look_up(self, pair: Pair) -> Look | None:
        """What is remembered of a pair's picture, unless its file has changed since."""
        if self.database is None:
            return None
        query = "SELECT stamp, digest, width, height, reason, detail FROM looks WHERE place = ?"
        try:
            row = self.database.execute(query, (name_place(pair),)).fetchone()
        except sqlite3.Error as error:
            self.give_up(error)
            return None
        return Look(*row[1:]) if row and row[0] and row[0] == read_stamp(pair.picture) else None

    def remember(self, looks: Iterable[tuple[Pair, str, Look]]) -> None:
        """Keep looks with the stamp that their file had before it was read, in one transaction."""
        if self.database is None:
            return
        rows = [(name_place(pair), stamp, *astuple(look)) for pair, stamp, look in looks if stamp and look.digest]
        try:
            with self.database:
                self.database.executemany("INSERT OR REPLACE INTO looks VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        except sqlite3.Error as error:
            self.give_up(error)

    def give_up(self, error: sqlite3.Error) -> None:
        logging.warning("what is known of pictures cannot be kept (%s); they are all looked at again", error)
        self.close()

    def close(self) -> None:
        if self.database is not None:
            self.database.close()
        self.database = None


def name_place(pair: Pair) -> str:
    """A picture's file, and its place within a shard."""
    part = "" if pair.length is None else f"?{pair.start}+{pair.length}"
    # names that are no UTF-8 come from old archives, and SQLite takes none
    return f"{os.path.abspath(pair.picture or '')}{part}".encode(errors="backslashreplace").decode()


def read_stamp(picture: Path | None) -> str:
    """A file's length and times of change; an empty text when it is gone or still too young to be told by them."""
    try:
        status = os.stat(picture or "")
    except OSError:
        return ""
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) < YOUNG:
        return ""
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
