"""Counts the names that an engineer must hold to follow a request from HTTP to the drawn token: `python -m tools.request_way`.

It starts one node with the default model on loopback (`tools.traced_node`), waits until it is ready, and sends plain streaming
chat completions, each over a connection that is open already. What runs from the request's first byte on is recorded:

- *there* ends when the callback returns with which the engine's thread handed the first token over; in one node that callback
  takes it to the entry.
- *there and back* ends when the client has the first text.

A function ran because of a request when it ran in most of the rounds' requests and not in most of the idle spans of the same
length that lie between them. So background work (gossip, readiness checks) drops out, and two runs give the same counts.

Counted are:

- files: those with at least one function that ran because of a request.
- names that ran: their functions and methods that ran because of a request, and their classes of which a method ran or an
  instance was an argument, a local or the result of a function that ran.
- names defined: all functions, methods and classes of those files, nested ones too.

C code is not counted, nor is a cached function that did not run again.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from statistics import median
from typing import IO
from urllib.parse import urlsplit

import msgspec

from tools.definitions import ROOT, Definition, definitions, source_files
from tools.traced_node import Recording

ANNOUNCEMENT = re.compile(r"mesh node \S+ up: (?P<http>http://\S+) gossip ")
MODEL = "mesh-demo"
ROUNDS = 15
WARM_UP_REQUESTS = 3
READY_TIMEOUT_S = 180.0
POLL_S = 0.2
SETTLE_S = 0.6  # for what the last request left to end; twice a round, so that what is kept for a second is made anew in each
HTTP_TIMEOUT_S = 60.0
MIN_READ_NAMES = 2  # of a file that a reader would open rather than skip

Name = tuple[str, str, int]  # file, qualified name, first line (0: a class of which an instance was held)


@dataclass(frozen=True, slots=True)
class Round:
    """One recorded request, and the idle span after it."""

    request: Recording
    text_at_ns: int  # when the client had the first text
    idle: Recording


@dataclass(frozen=True, slots=True)
class FileNames:
    """One file on the way, its names in the order of their first calls."""

    file: str
    ran: tuple[str, ...]
    defined: int


@dataclass(frozen=True, slots=True)
class Way:
    """What was counted on a way."""

    files: tuple[FileNames, ...]  # in the order of their first calls
    class_only_files: tuple[str, ...]  # define classes whose instances are held on the way, but no function that ran


def counts(files: Sequence[FileNames]) -> str:
    """Returns how many files there are, and their names."""
    ran, defined = sum(len(each.ran) for each in files), sum(each.defined for each in files)
    return f"{len(files)} files; names: {ran} ran, {defined} defined in those files"


# --- counting, without I/O


def names_until(recording: Recording, end_ns: int) -> dict[Name, int]:
    """Returns what ran or was held until `end_ns`, with the time since the recording began."""
    found: dict[Name, int] = {(call.file, call.name, call.line): call.at_ns for call in recording.calls}
    found.update({(held.file, held.name, 0): held.at_ns for held in recording.held})
    return {name: at_ns - recording.began_ns for name, at_ns in found.items() if at_ns <= end_ns}


def because_of_request(requests: Sequence[dict[Name, int]], idles: Sequence[Iterable[Name]]) -> list[Name]:
    """Returns the names in most of `requests` and not in most of `idles`, in the order of their median times."""
    in_requests = Counter(name for each in requests for name in each)
    in_idles = Counter(name for each in idles for name in each)
    kept = [name for name, times in in_requests.items() if 2 * times > len(requests) and 2 * in_idles[name] <= len(idles)]
    at_ns = {name: median(each[name] for each in requests if name in each) for name in kept}
    return sorted(kept, key=lambda name: (at_ns[name], name))


def way_of(names: Sequence[Name], defined: dict[str, list[Definition]]) -> Way:
    """Counts `names` (in the order of their calls) in files that define `defined`."""
    found: dict[str, dict[Definition, None]] = {}  # file -> what ran, in order
    held: dict[str, dict[Definition, None]] = {}
    run_files: dict[str, None] = {}
    for file, qualified_name, line in names:
        matching = [each for each in defined[file] if each.qualified_name == qualified_name]
        if line == 0:
            held.setdefault(file, {}).update(dict.fromkeys(each for each in matching if each.kind == "class"))
            continue
        if qualified_name != "<module>":
            run_files[file] = None
        for function in (each for each in matching if each.kind == "function" and each.first_line == line):
            owner = qualified_name.rpartition(".")[0]
            classes = [each for each in defined[file] if each.kind == "class" and each.qualified_name == owner]
            found.setdefault(file, {}).update(dict.fromkeys([*classes, function]))
    files = []
    for file in run_files:
        ran = {**found.get(file, {}), **held.get(file, {})}
        files.append(FileNames(file, tuple(each.qualified_name for each in ran), len(defined[file])))
    return Way(tuple(files), tuple(sorted(file for file, classes in held.items() if classes and file not in run_files)))


def ways_of(rounds: Sequence[Round], defined: dict[str, list[Definition]]) -> dict[str, Way]:
    """Returns the way there, and there and back."""
    ends: dict[str, list[int]] = {
        "there": [each.request.token_handed_over_ns or 0 for each in rounds],
        "there_and_back": [each.text_at_ns for each in rounds],
    }
    ways = {}
    for which, ends_ns in ends.items():
        requests = [names_until(each.request, end_ns) for each, end_ns in zip(rounds, ends_ns)]
        spans_ns = [end_ns - each.request.began_ns for each, end_ns in zip(rounds, ends_ns)]
        idles = [names_until(each.idle, each.idle.began_ns + span_ns) for each, span_ns in zip(rounds, spans_ns)]
        ways[which] = way_of(because_of_request(requests, idles), defined)
    return ways


# --- the node and its client


class TracedNode:
    """A node in a child process that records on request."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._stdin: IO[str] = process.stdin
        self._stdout: IO[str] = process.stdout
        announced = ANNOUNCEMENT.match(self._read())
        if announced is None:
            raise SystemExit("the node's first line is not its announcement")
        self.address = urlsplit(announced["http"]).netloc

    def _read(self) -> str:
        line = self._stdout.readline()
        if not line:
            raise SystemExit("the node has ended; its log is above")
        return line

    def begin(self) -> None:
        self._tell("begin")
        if self._read().strip() != "recording":
            raise SystemExit("the node did not begin to record")

    def end(self) -> Recording:
        self._tell("end")
        return msgspec.json.decode(self._read(), type=Recording)

    def _tell(self, word: str) -> None:
        self._stdin.write(f"{word}\n")
        self._stdin.flush()

    def wait_ready(self) -> None:
        """Waits until a token has come through a complete path."""
        give_up_at = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < give_up_at:
            connection = http.client.HTTPConnection(self.address, timeout=HTTP_TIMEOUT_S)
            connection.request("GET", "/ready")
            status = connection.getresponse().status
            connection.close()
            if status == 200:
                return
            time.sleep(POLL_S)
        raise SystemExit(f"the node was not ready within {READY_TIMEOUT_S:g} s")


@contextmanager
def traced_node() -> Iterator[TracedNode]:
    """Starts the node as `mesh up` does; it has ended when the context is left. Its log goes to standard error."""
    with tempfile.TemporaryDirectory(prefix="mesh-") as folder:
        command = [sys.executable, "-m", "tools.traced_node", "up", "--name", "traced", "--data-dir", folder]
        command += ["--bind", "127.0.0.1:0", "--http", "127.0.0.1:0"]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as process:
            try:
                yield TracedNode(process)
            finally:
                assert process.stdin is not None
                process.stdin.close()  # which ends it
                process.wait()


def request_text(node: TracedNode, number: int, record: bool) -> tuple[Recording | None, int]:
    """Sends one streaming chat completion; returns what ran until its first text came, and when that was."""
    body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": f"{number} ships: tell me of the sea."}]}
    connection = http.client.HTTPConnection(node.address, timeout=HTTP_TIMEOUT_S)
    connection.connect()
    time.sleep(SETTLE_S)
    if record:
        node.begin()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"the node answered {response.status}: {response.read().decode()}")
    recording, text_at_ns = None, 0
    for line in response:
        if not text_at_ns and has_text(line):
            text_at_ns = time.monotonic_ns()
            recording = node.end() if record else None
    connection.close()
    if not text_at_ns:
        raise SystemExit("the stream ended without text")
    return recording, text_at_ns


def has_text(line: bytes) -> bool:
    """Whether a line of the stream is a chunk with text."""
    data = line.strip().removeprefix(b"data: ")
    if not data.startswith(b"{"):
        return False
    return any(choice.get("delta", {}).get("content") for choice in json.loads(data).get("choices", []))


def record_round(node: TracedNode, number: int) -> Round:
    """Records one request and an idle span of the same length."""
    request, text_at_ns = request_text(node, number, record=True)
    assert request is not None
    if request.token_handed_over_ns is None:
        raise SystemExit("no thread of the engine handed a token over through TrioToken.run_sync_soon: see tools/traced_node.py")
    time.sleep(SETTLE_S)
    node.begin()
    time.sleep((text_at_ns - request.began_ns) / 1e9)
    return Round(request, text_at_ns, node.end())


def measure(rounds: int) -> dict[str, Way]:
    """Records `rounds` requests to a node of its own and counts."""
    with traced_node() as node:
        node.wait_ready()
        for number in range(WARM_UP_REQUESTS):
            request_text(node, number, record=False)
        recorded = [record_round(node, WARM_UP_REQUESTS + number) for number in range(rounds)]
    return ways_of(recorded, {file: list(definitions(tree)) for file, tree in source_files().items()})


# --- reporting


def by_folder(files: Sequence[FileNames]) -> dict[str, list[FileNames]]:
    """Returns the files by folder; folders and files in the order of their first calls."""
    folders: dict[str, list[FileNames]] = {}
    for each in files:
        folders.setdefault(str(PurePosixPath(each.file).parent), []).append(each)
    return folders


def lines_of(ways: dict[str, Way], verbose: bool) -> Iterator[str]:
    """Yields the report."""
    for which, way in ways.items():
        read = [each for each in way.files if len(each.ran) >= MIN_READ_NAMES]
        in_node = [each for each in read if each.file.startswith("node/")]
        yield f"{which.replace('_', ' ')}: {counts(way.files)}"
        yield f"  of which at least {MIN_READ_NAMES} names ran: {counts(read)}"
        yield f"  of these in node/: {counts(in_node)}"
        yield f"  more files, with nothing but classes of which instances are held: {len(way.class_only_files)}"
        if not verbose:
            continue
        for folder, files in by_folder(way.files).items():
            yield f"\n  {folder}/  {counts(files)}"
            for each in files:
                yield f"    {PurePosixPath(each.file).name}  {len(each.ran)} / {each.defined}"
                yield from (f"      {name}" for name in each.ran)
        yield f"\n  files with classes alone: {', '.join(way.class_only_files) or 'none'}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the counts and names as JSON")
    parser.add_argument("--verbose", action="store_true", help="list the files by folder with the names that ran")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how many requests are recorded")
    asked = parser.parse_args()
    ways = measure(asked.rounds)
    if asked.json:
        print(json.dumps({which: asdict(way) for which, way in ways.items()}, indent=1))
    else:
        print("\n".join(lines_of(ways, asked.verbose)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
