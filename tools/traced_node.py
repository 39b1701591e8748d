"""Runs a node whose function calls are recorded on request: `python -m tools.traced_node up …` runs `mesh up …`.

`tools.request_way` starts it and writes one word a line to its standard input; the answers go to standard output.

- `begin`: recording starts; the answer is `recording`.
- `end`: recording stops; the answer is the `Recording` as one line of JSON.
- The end of the input ends the process.

Only the first call of each function is kept. `sys.setprofile` sees a function when it starts and whenever a generator or
coroutine goes on, so a task that was waiting and goes on because of a request counts as called.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import msgspec
import trio

from tools.definitions import PACKAGES, ROOT


class Call(msgspec.Struct, frozen=True):
    """The first call of a function. `at_ns` is on the system's monotonic clock, as all times here."""

    file: str  # relative to the repository
    name: str  # qualified
    line: int
    at_ns: int


class Held(msgspec.Struct, frozen=True):
    """The first time that a function of the repository had an instance of a class as argument, local or result."""

    file: str  # that defines the class
    name: str  # qualified
    at_ns: int


class Recording(msgspec.Struct, frozen=True):
    """What ran between `begin` and `end`."""

    began_ns: int
    calls: list[Call]
    held: list[Held]
    token_handed_over_ns: int | None  # when the callback returned with which the engine's thread first gave results back


class Recorder:
    """A profile function for every thread of the process.

    The engine's thread gives results back through `TrioToken.run_sync_soon`. The first call of it that a function of the
    repository makes outside the main thread is taken for the first token, and the return of the callback in the main thread
    for the moment at which the entry has it. What the engine's thread does after that call is for later tokens, and left out.
    """

    def __init__(self, root: Path = ROOT, packages: tuple[str, ...] = PACKAGES) -> None:
        self._root = f"{root}{os.sep}"
        self._packages = packages
        self._files: dict[str, str] = {}  # code's file -> path in the repository, or ""
        self._classes: dict[type, str] = {}  # class -> path of the file that defines it, or ""
        self._recording = False
        self._clear()

    def _clear(self) -> None:
        self._began_ns = time.monotonic_ns()
        self._calls: dict[tuple[str, int, str], Call] = {}
        self._held: dict[type, Held] = {}
        self._engine_thread: int | None = None  # known once it has handed a token over
        self._handover: CodeType | None = None
        self._handed_over_ns: int | None = None

    def begin(self) -> None:
        self._clear()
        self._recording = True

    def end(self) -> Recording:
        self._recording = False
        calls = sorted(list(self._calls.values()), key=lambda call: call.at_ns)
        return Recording(self._began_ns, calls, list(self._held.values()), self._handed_over_ns)

    def __call__(self, frame: FrameType, event: str, value: Any) -> None:
        """As `sys.setprofile` demands. `value`: what the function returns, on the event `return`."""
        if not self._recording or event not in ("call", "return") or threading.get_ident() == self._engine_thread:
            return
        code = frame.f_code
        if code is trio.lowlevel.TrioToken.run_sync_soon.__code__ and event == "call":
            self._note_handover(frame)
        file = self._file_of(code.co_filename)
        if not file:
            return
        now_ns = time.monotonic_ns()
        key = file, code.co_firstlineno, code.co_qualname
        if event == "call" and key not in self._calls:
            self._calls[key] = Call(file, code.co_qualname, code.co_firstlineno, now_ns)
        for held in (*frame.f_locals.values(), value):
            self._note_class(type(held), now_ns)
        if event == "return" and self._ends_handover(code):
            self._handed_over_ns = now_ns

    def _note_handover(self, frame: FrameType) -> None:
        caller = frame.f_back
        in_main = threading.current_thread() is threading.main_thread()
        if self._handover is None and caller is not None and not in_main and self._file_of(caller.f_code.co_filename):
            self._handover = code_of(frame.f_locals["sync_fn"])
            self._engine_thread = threading.get_ident()

    def _ends_handover(self, code: CodeType) -> bool:
        in_main = threading.current_thread() is threading.main_thread()
        return code is self._handover and self._handed_over_ns is None and in_main

    def _note_class(self, held: type, now_ns: int) -> None:
        if held not in self._held and (file := self._class_file(held)):
            self._held[held] = Held(file, held.__qualname__, now_ns)

    def _class_file(self, held: type) -> str:
        file = self._classes.get(held)
        if file is None:
            module = sys.modules.get(held.__module__)
            file = self._classes[held] = self._file_of(getattr(module, "__file__", None) or "")
        return file

    def _file_of(self, path: str) -> str:
        """Returns the path in the repository; empty for a file of anything else."""
        file = self._files.get(path)
        if file is None:
            relative = Path(path[len(self._root) :]).as_posix() if path.startswith(self._root) else ""
            file = self._files[path] = relative if relative.split("/")[0] in self._packages else ""
        return file


def code_of(function: Callable[..., object]) -> CodeType | None:
    """Returns the code of a function, a method or a `functools.partial` of one."""
    while (inner := getattr(function, "func", None)) is not None:
        function = inner
    found = getattr(function, "__code__", None)
    return found if isinstance(found, CodeType) else None


def obey(recorder: Recorder) -> None:
    """Does what standard input says; ends the process at its end."""
    for line in sys.stdin:
        if line.strip() == "begin":
            recorder.begin()
            print("recording", flush=True)
        elif line.strip() == "end":
            print(msgspec.json.encode(recorder.end()).decode(), flush=True)
    os._exit(0)


def main() -> None:
    recorder = Recorder()
    threading.Thread(target=obey, args=(recorder,), name="recorder", daemon=True).start()
    threading.setprofile(recorder)  # for threads that start from here on
    sys.setprofile(recorder)
    sys.argv[0] = "mesh"
    runpy.run_module("cli", run_name="__main__", alter_sys=False)


if __name__ == "__main__":
    main()
