"""`mesh demo`: three real nodes, questions answered from documents with citations, a node killed in mid-answer, the same answer.

The layers are pinned so that no node holds all of them and every layer is held twice: each path crosses at
least two nodes, and any one node can be lost. The longest answer is asked for again, and a node on its path is killed
while it comes; the demo succeeds only if both gave the same tokens.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import output
from mesh.errors import MeshError
from mesh.json_object import JsonObject

if TYPE_CHECKING:
    import httpx

    from cli.local_mesh import LocalMesh, LocalNode
    from mesh.client.api import DocumentFile
    from mesh.client.client import Client

STORE = "demo"
# Chosen by their answers: the default model quotes the sentence that answers each. Those in front are asked first, and
# are answered by pages that seldom change.
QUESTIONS = (
    "What does a stage without blocks give up?",
    "Who plans the whole path?",
    "Which number do UDP and TCP share?",
    "Why do HTTP/2 requests need a proxy?",
    "When does a client have to ask again?",
    "Where does a node listen without a key?",
)
PASSAGES = 2  # of few sentences the default model finds the right one more often
KILL_AFTER_TOKENS = 3  # answers are a sentence long: the kill must fall well before its end
MAX_TOKENS = 160  # a sentence is shorter
READY_TIMEOUT_S = 60.0


class DemoFailed(MeshError):
    """A step did not come out as the mesh promises; the message names it."""


@dataclass(slots=True)
class DemoAnswer:
    """One streamed answer. Times in seconds since the request."""

    question: str = ""
    stream: str = ""
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    times_s: list[float] = field(default_factory=list)
    citations: list[JsonObject] = field(default_factory=list)
    mesh: JsonObject = field(default_factory=dict)

    @property
    def took_s(self) -> float:
        return self.times_s[-1] if self.times_s else 0.0

    def longest_gap_s(self) -> float:
        return max((later - earlier for earlier, later in zip(self.times_s, self.times_s[1:])), default=0.0)


def pinned_layers(layers: int) -> tuple[str, str, str]:
    """`--layers` of three nodes: each layer on exactly two of them, no node with all of them.

    Raises:
        DemoFailed: a model of fewer than three layers cannot be split so.
    """
    if layers < 3:
        raise DemoFailed(f"the demo splits a model over three nodes, so it needs 3 layers or more; this one has {layers}")
    third, two_thirds = layers // 3, layers - layers // 3
    return f"0:{two_thirds}", f"{third}:{layers}", f"0:{third},{two_thirds}:{layers}"


def project_documents() -> Iterator[DocumentFile]:
    """README.md and docs/**/*.md of the checkout; of an installed package the README, which its metadata carries."""
    from mesh.client.api import DocumentFile
    from mesh.client.client import read_documents

    root = Path(__file__).resolve().parent.parent
    found = [path for path in (root / "README.md", root / "docs") if path.exists()]
    if found:
        documents = read_documents(found)
        yield from (document for document in documents if document.name.endswith(".md") and document.content.strip())
        return
    from importlib.metadata import metadata

    yield DocumentFile("README.md", str(metadata("gossip-mesh").json.get("description", "")).encode())


def ask_once(client: Client, question: str, watch: Callable[[DemoAnswer], None] = lambda run: None) -> DemoAnswer:
    """Asks and reads the answer, each time the likeliest token; `watch` is called after each chunk."""
    from mesh.client.answers import text_of
    from mesh.client.api import citations

    run = DemoAnswer(question)
    begun = time.monotonic()
    with client.ask(
        question, STORE, top_k=PASSAGES, stream=True, temperature=0, max_tokens=MAX_TOKENS, return_token_ids=True
    ) as stream:
        for chunk in stream:
            listed = [token for choice in chunk.get("choices") or () for token in choice.get("token_ids") or ()]
            run.stream = stream.id
            run.text += text_of(chunk)
            if listed:
                run.token_ids += listed
                run.times_s.append(time.monotonic() - begun)
            watch(run)
        run.citations = citations(stream.progress.last or {})
        run.mesh = stream.mesh
        if stream.progress.missing_tokens or stream.progress.duplicate_tokens:
            missing, duplicate = stream.progress.missing_tokens, stream.progress.duplicate_tokens
            raise DemoFailed(f"expected every token once, got {missing} missing and {duplicate} duplicate ones")
    return run


def wait_ready(nodes: list[LocalNode]) -> None:
    """Waits until every node sees all nodes, every layer twice, and has had a canary token through a path.

    Raises:
        DemoFailed: not within `READY_TIMEOUT_S`, or a node ended; with what was last seen.
    """
    import httpx

    deadline = time.monotonic() + READY_TIMEOUT_S
    with httpx.Client(timeout=10.0, trust_env=False) as http:
        for node in nodes:
            while missing := what_is_missing(http, node, len(nodes)):
                if ended := [other.name for other in nodes if not other.alive]:
                    raise DemoFailed(f"expected three running nodes, but {', '.join(ended)} ended by itself")
                if time.monotonic() > deadline:
                    raise DemoFailed(f"{node.name} was not ready within {READY_TIMEOUT_S:.0f} s: {missing}")
                time.sleep(0.1)


def what_is_missing(http: httpx.Client, node: LocalNode, expected: int) -> str:
    """Why the node is not ready for the demo; empty when it is."""
    import httpx

    try:
        status = http.get(f"{node.http}/mesh/status").json()
        ready = http.get(f"{node.http}/ready")
    except httpx.TransportError as error:
        return f"{node.http} does not answer ({error})"
    alive = sum(seen["state"] == "alive" for seen in status["nodes"])
    replicas = min((model["min_replicas"] for model in status["models"]), default=0)
    if alive == expected and replicas >= 2 and ready.status_code == 200:
        return ""
    seen = f"it sees {alive} of {expected} nodes and each layer on at least {replicas}"
    return f"{seen}; /ready says {ready.status_code} {ready.text[:200]}"


def wait_replicated(client: Client) -> tuple[int, bool]:
    """How many copies the demo's store has, and whether they agree; waits for up to 15 s."""
    deadline = time.monotonic() + 15.0
    while True:
        store = next((store for store in client.status()["stores"] if store["name"] == STORE), None)
        if store is not None and store["in_sync"] and store["replicas"] >= 2:
            return store["replicas"], True
        if time.monotonic() > deadline:
            return (store["replicas"] if store else 0), False
        time.sleep(0.1)


@dataclass(slots=True)
class Killer:
    """Kills a node of the path that is not the entry, once the answer is under way.

    `http_of` is asked for beforehand: a sentence is over soon.
    """

    mesh: LocalMesh
    client: Client
    entry: LocalNode
    http_of: dict[str, str]  # by node id
    victim: LocalNode | None = None
    at_token: int = 0
    layers: str = ""

    def __call__(self, run: DemoAnswer) -> None:
        if self.victim is not None or len(run.token_ids) < KILL_AFTER_TOKENS:
            return
        for stage in self.client.why(run.stream)["path"]:
            for node in self.mesh.nodes:
                if node.http == self.http_of.get(stage["node"]) and node is not self.entry:
                    self.mesh.kill(node)
                    self.victim, self.at_token = node, len(run.token_ids)
                    self.layers = f"{stage['start']}:{stage['end']}"
                    return
        raise DemoFailed("expected a path over two nodes, got one that only the entry is on")


def describe_path(client: Client, run: DemoAnswer) -> str:
    names = {seen["id"]: seen["name"] for seen in client.status()["nodes"]}
    stages = (
        f"{names.get(stage['node'], stage['node'])} [{stage['start']}:{stage['end']}]" for stage in run.mesh.get("path", ())
    )
    return " -> ".join(stages)


def compare(reference: DemoAnswer, disturbed: DemoAnswer, killer: Killer) -> None:
    """Raises DemoFailed unless both runs gave the same tokens and the kill fell into the second."""
    if killer.victim is None:
        raise DemoFailed(f"the answer ended after {len(disturbed.token_ids)} tokens, before a node could be killed")
    if reference.token_ids != disturbed.token_ids:
        pairs = zip(reference.token_ids, disturbed.token_ids)
        shorter = min(len(reference.token_ids), len(disturbed.token_ids))
        first = next((index for index, (left, right) in enumerate(pairs) if left != right), shorter)
        raise DemoFailed(
            f"expected the tokens of the undisturbed run, got others from token {first} on "
            f"({len(reference.token_ids)} against {len(disturbed.token_ids)} tokens)"
        )
    if disturbed.mesh.get("attempts", 1) < 2:
        raise DemoFailed("equal tokens, but the kill came too late to disturb the answer; ask something with a longer answer")


def ask_until_quoted(story: output.Story, node: LocalNode, questions: Iterator[str], client: Client) -> list[DemoAnswer]:
    """Asks the node the next of `questions`, and further ones until an answer is a sentence of a document.

    A change of the documents may take the model's answer to a question away from it. All answers are shown and returned.
    """
    from mesh.client.client import Client

    runs: list[DemoAnswer] = []
    with Client([node.http]) as asked:
        for question in questions:
            story.step(f"A question to {node.name}: {question}")
            run = ask_once(asked, question)
            runs.append(run)
            story.quote(run.text)
            quoted = tell_sources(story, run)
            story.say(f"{len(run.token_ids)} tokens in {run.took_s:.2f} s, path {describe_path(client, run)}")
            if quoted:
                break
            story.say("that is no sentence of the documents: the model is a demonstration; the next question")
    return runs


def tell_sources(story: output.Story, run: DemoAnswer) -> bool:
    """Shows the passages that the answer cites; whether it quotes one of them word for word.

    Raises:
        DemoFailed: not all of the index answered.
    """
    if run.mesh.get("shards_ok") != run.mesh.get("shards_total") or "digest" not in run.mesh:
        raise DemoFailed(f"expected all shards of {STORE} to answer, got {run.mesh.get('shards_ok')}")
    quoted = False
    for citation in run.citations:
        word_for_word = is_quoted(run.text, str(citation.get("quote", "")))
        quoted |= word_for_word
        place = f"{citation['filename']}, characters {citation['start']}-{citation['end']}"
        story.say(f"[{citation['number']}] {place}{': there word for word' if word_for_word else ''}")
    if not run.citations:
        story.say("it names no passage")
    return quoted


def is_quoted(answer: str, passage: str) -> bool:
    """Whether an answer, without its citation and whatever its line breaks, stands in the passage and cuts no word."""
    plain = " ".join(answer.rpartition(" [")[0].split())
    return bool(plain) and re.search(rf"(?<!\w){re.escape(plain)}(?!\w)", " ".join(passage.split())) is not None


def perform(mesh: LocalMesh, story: output.Story) -> None:
    """The demo's steps. Raises MeshError when one of them fails."""
    from cli.models import default_model
    from mesh.client.client import Client

    def since(begun: float) -> str:
        return f"{time.monotonic() - begun:.1f} s"

    begun = time.monotonic()
    model = default_model()
    spans = pinned_layers(model["layers"])
    story.step(f"Three nodes; the {model['layers']} layers of {model['id']} split over them, each layer on two")
    nodes = mesh.start_all({name: ("--layers", span) for name, span in zip(("ada", "bob", "cyd"), spans)})
    entry = nodes[0]
    with Client([entry.http]) as client:
        wait_ready(nodes)
        for node, span in zip(nodes, spans):
            story.say(f"{node.name}  layers {span:<8} pid {node.pid}  {node.http}")
        story.say(f"all ready after {since(begun)}")

        begun = time.monotonic()
        story.step("The project's own documents go into the mesh")
        added = client.docs.add_documents(project_documents(), STORE)
        replicas, in_sync = wait_replicated(client)
        copies = f"{replicas} copies, {'in sync' if in_sync else 'not yet in sync'}"
        story.say(f"{len(added)} documents, {copies}, after {since(begun)}")

        questions = iter(QUESTIONS)
        runs = [run for node in nodes for run in ask_until_quoted(story, node, questions, client)]
        reference = max(runs, key=lambda run: len(run.token_ids))
        story.step(f"One of them again, to {entry.name}, and a node on its path is killed in mid-answer: {reference.question}")
        http_of = {seen["id"]: seen["http"] for seen in client.status()["nodes"]}
        killer = Killer(mesh, client, entry, http_of)
        disturbed = ask_once(client, reference.question, killer)
        if killer.victim is not None:
            story.say(f"SIGKILL to {killer.victim.name} (layers {killer.layers} of the path) after token {killer.at_token}")
        story.say(f"path afterwards {describe_path(client, disturbed)}, attempts {disturbed.mesh.get('attempts')}")
        story.quote(disturbed.text)
        story.say(
            f"{len(disturbed.token_ids)} tokens in {disturbed.took_s:.2f} s, longest pause {disturbed.longest_gap_s():.2f} s"
        )
        compare(reference, disturbed, killer)


def demo(
    logs: Annotated[Path | None, typer.Option("--logs", metavar="DIR", help="Keep the nodes' logs and files here.")] = None,
) -> None:
    """Three nodes on this machine, questions, a kill in mid-answer, the same answer. Exit code 0 only if it was the same."""
    from cli.local_mesh import LocalMesh

    story = output.Story()
    story.title("A mesh of three nodes, one of which is about to die")
    begun = time.monotonic()
    with LocalMesh(logs) as mesh:
        try:
            perform(mesh, story)
        except MeshError as error:
            for node in mesh.nodes:
                output.note(f"--- {node.name}: {node.log_tail()}")
            story.verdict(f"Failed: {str(error).splitlines()[0]}", good=False)
            raise typer.Exit(1) from None
    took_s = time.monotonic() - begun
    story.verdict(f"Token for token the same answer. Everything has ended; the demo took {took_s:.1f} s.", good=True)
