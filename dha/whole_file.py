"""Files that are written whole or not at all."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replace_whole(path: Path) -> Iterator[Path]:
    """A place beside a file to write to, which takes the file's at the end of the block; after an error it is gone.

    A crash leaves the old file or none. Raises OSError.
    """
    # not the process alone: containers that share a folder may have the same numbers
    partial = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file at once: a crash leaves the old one or none; raises OSError."""
    with replace_whole(path) as partial:
        partial.write_bytes(content)
