"""Ending with the program that started this one, whatever becomes of it."""

import os
import signal
import threading


def follow_parent() -> None:
    """From now on the end of standard input asks this process to stop, as SIGTERM does.

    The parent holds the other end: it closes it to ask, and the system closes it when the parent ends, killed or not.
    Unlike SIGTERM it can be asked for on Windows.
    """
    threading.Thread(target=wait_for_end, daemon=True, name="leash").start()


def wait_for_end() -> None:
    # not sys.stdin: a thread that sleeps in its buffer would disturb the interpreter's end
    while os.read(0, 4096):
        pass
    signal.raise_signal(signal.SIGTERM)
