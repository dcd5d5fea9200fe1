"""Ctrl-C while C runs: it waits until the call is over."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

policy_thread: int | None = None
"""Where the engine calls code of the policy's, which may never return: a second Ctrl-C breaks it off."""

_is_held = False
_late: list[int] = []


@contextmanager
def held(*, may_raise: bool = True) -> Iterator[None]:
    """Let the handler of SIGINT run after this block instead of within it.

    Python would run it at any bytecode of a callback. An exception raised there either ends the callback,
    and the step at hand is missing from the record, or is lost, for none can cross C.

    Parameters
    ----------
    may_raise
        False: in a destructor, where an exception is lost; the next block's end then calls the handler.
    """
    global _is_held
    handler = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()  # Python runs handlers on no other
    if not is_main or _is_held or not callable(handler):
        yield
        return
    pressed: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        if policy_thread is not None and len(pressed) > 1:
            _break_off(policy_thread)

    signal.signal(signal.SIGINT, note)
    _is_held = True
    try:
        yield
    finally:
        _is_held = False
        signal.signal(signal.SIGINT, handler)
        if not may_raise:
            _late.extend(pressed)
        elif pressed or _late:
            _late.clear()
            handler(signal.SIGINT, None)


def _break_off(thread: int) -> None:
    """Raise `KeyboardInterrupt` in a thread: at once in this one, in another at its next instruction."""
    if thread == threading.get_ident():
        raise KeyboardInterrupt
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(KeyboardInterrupt))
