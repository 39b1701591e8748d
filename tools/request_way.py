"""`python -m tools.request_way`: how much code a request crosses from HTTP to its first token: files and definitions.

A node runs in a child process with a profiler in every thread. What runs during a streamed chat completion, from its first byte
to its first token at the client, and does not run while the node idles, is the request's way. Two figures for the names to hold:
`ran` counts the functions that ran and the classes whose methods ran; `defined` counts all functions and classes of those files.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mesh", "membership", "routing", "rag", "node", "cli")
MODEL = "mesh-demo"
IDLE_S = 3.0
READ_NAMES = 3
READY_S = 120.0
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Which number do UDP and TCP share?"}], "stream": True}

Way = dict[str, list[str]]
"""File -> the names that ran in it, both in the order of their first call."""


def definitions(source: str) -> list[str]:
    """All functions, methods and classes of a file, by their qualified names."""
    found = []

    def visit(tree: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(tree):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.append(prefix + child.name)
                visit(child, prefix + child.name + ("." if isinstance(child, ast.ClassDef) else ".<locals>."))
            else:
                visit(child, prefix)

    visit(ast.parse(source), "")
    return found


def way(request: Iterable[tuple[str, str]], idle: Iterable[tuple[str, str]]) -> Way:
    """What ran for the request alone, as (file, qualified name); lambdas and comprehensions count to what they stand in."""
    at_rest, found = set(idle), defaultdict[str, list[str]](list)
    for file, name in request:
        if (file, name) in at_rest:
            continue
        named = name.split(".<locals>.<lambda>")[0].split(".<locals>.<")[0]
        if named.startswith("<"):
            continue
        owner = named.rpartition(".")[0]
        for each in (owner, named):
            if each and not each.endswith("<locals>") and each not in found[file]:
                found[file].append(each)
    return {file: names for file, names in found.items() if names}


class Recorder:
    """A profiler for `sys.setprofile`: the functions of this repository that are called while it is on."""

    def __init__(self) -> None:
        self.on = False
        self._codes: dict[CodeType, None] = {}

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if self.on and event == "call" and frame.f_code not in self._codes:
            self._codes[frame.f_code] = None

    def take(self) -> list[tuple[str, str]]:
        """What was recorded since the last time: (file, qualified name), in the order of the first call."""
        codes, self._codes = list(self._codes), {}
        inside = [(Path(code.co_filename), code.co_qualname) for code in codes if code.co_filename.startswith(str(ROOT))]
        named = [(path.relative_to(ROOT).as_posix(), name) for path, name in inside]
        return [(file, name) for file, name in named if file.split("/")[0] in PACKAGES]


def node_under_a_profiler(options: list[str]) -> None:
    """Runs `mesh up` in this process; a line on stdin switches the recording on or off, and answers with what was recorded."""
    recorder = Recorder()

    def obey() -> None:
        for line in sys.stdin:
            recorder.on = line.strip() == "on"
            print(json.dumps({"recorded": recorder.take()}), file=sys.stderr, flush=True)

    from cli.main import app

    threading.Thread(target=obey, daemon=True).start()
    threading.setprofile(recorder)
    sys.setprofile(recorder)
    app(["up", *options])


class Child:
    """The node as a child process: its HTTP address, and its recorder."""

    def __init__(self, folder: Path) -> None:
        options = ["--data-dir", str(folder), "--bind", "127.0.0.1:0", "--http", "127.0.0.1:0", "--log-format", "json"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tools.request_way", "--node", *options],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()  # `mesh node NAME up: http://HOST:PORT gossip HOST:PORT`
        if " up: " not in line:
            raise SystemExit(f"the node ended before it was up: {self.process.stderr.read() if self.process.stderr else ''}")
        self.http = line.split(" up: ")[1].split()[0]

    def switch(self, on: bool) -> list[tuple[str, str]]:
        """What was recorded since the last switch."""
        assert self.process.stdin is not None and self.process.stderr is not None
        self.process.stdin.write("on\n" if on else "off\n")
        self.process.stdin.flush()
        for line in self.process.stderr:  # its log is there too
            if line.startswith('{"recorded"'):
                return [(file, name) for file, name in json.loads(line)["recorded"]]
        raise SystemExit("the node ended")

    def end(self) -> None:
        self.process.terminate()
        self.process.communicate(timeout=60)


def first_token(http: str) -> None:
    """Asks and reads until the first text has come, then hangs up."""
    import httpx

    with (
        httpx.Client(timeout=60, trust_env=False) as client,
        client.stream("POST", f"{http}/v1/chat/completions", json=BODY) as reply,
    ):
        for line in reply.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                return
    raise SystemExit("the answer was empty")


def until_ready(http: str) -> None:
    import httpx

    ends_at = time.monotonic() + READY_S
    while httpx.get(f"{http}/ready", trust_env=False).status_code != 200:
        if time.monotonic() > ends_at:
            raise SystemExit(f"the node was not ready after {READY_S:.0f} s")
        time.sleep(0.2)


def measured() -> Way:
    with tempfile.TemporaryDirectory() as folder:
        child = Child(Path(folder))
        try:
            until_ready(child.http)
            first_token(child.http)  # what is imported or compiled at the first use is not the way
            time.sleep(IDLE_S)
            child.switch(on=True)
            time.sleep(IDLE_S)
            idle = child.switch(on=False)
            child.switch(on=True)
            first_token(child.http)
            request = child.switch(on=False)
        finally:
            child.end()
    return way(request, idle)


def figures(found: Way) -> dict[str, dict[str, int]]:
    """`all`: every file of which something ran; `read`: those of which at least `READ_NAMES` names ran."""
    read = {file: names for file, names in found.items() if len(names) >= READ_NAMES}
    return {name: _count(part) for name, part in (("all", found), ("read", read))}


def _count(part: Way) -> dict[str, int]:
    defined = sum(len(definitions((ROOT / file).read_text())) for file in part)
    return {"files": len(part), "ran": sum(map(len, part.values())), "defined": defined}


def main() -> None:
    parser = argparse.ArgumentParser(description="How much code a request crosses from HTTP to its first token.")
    parser.add_argument("--verbose", action="store_true", help="each file with the names that ran in it")
    given = parser.parse_args()
    found = measured()
    for file, names in found.items():
        all_of_it = definitions((ROOT / file).read_text())
        print(f"{file}: {len(names)} of {len(all_of_it)}")
        if given.verbose:
            print("    " + ", ".join(names))
    print(json.dumps(figures(found)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--node"]:
        node_under_a_profiler(sys.argv[2:])
    else:
        main()
