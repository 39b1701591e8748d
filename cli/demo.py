"""`mesh demo`: three real nodes, a question answered with citations, a node killed in mid-answer, the same answer.

The layers are pinned so that no node holds all of them and every layer is held twice: each path crosses at
least two nodes, and any one node can be lost. The same request runs twice with the same seed, once
undisturbed and once with a kill; the demo succeeds only if both gave the same tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import output
from mesh.errors import MeshError

if TYPE_CHECKING:
    import httpx

    from cli.local_mesh import LocalMesh, LocalNode
    from mesh.client import Client
    from mesh.client_api import Document

STORE = "demo"
QUESTION = "What happens to a request when a node that works on it dies?"
PASSAGES = 3
KILL_AFTER_TOKENS = 10
READY_TIMEOUT_S = 60.0
LONG_ENOUGH_S = 0.4  # a shorter answer might end before the kill takes effect
LONGEST_TOKENS = 768


class DemoFailed(MeshError):
    """A step did not come out as the mesh promises; the message says which."""


@dataclass(slots=True)
class Run:
    """One streamed answer. Times in seconds since the request."""

    stream: str = ""
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    times_s: list[float] = field(default_factory=list)
    citations: list[dict[str, Any]] = field(default_factory=list)
    mesh: dict[str, Any] = field(default_factory=dict)

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


def project_documents() -> Iterator[Document]:
    """README.md and docs/**/*.md of the checkout; of an installed package the README, which its metadata carries."""
    from mesh.client import read_documents
    from mesh.client_api import Document

    root = Path(__file__).resolve().parent.parent
    found = [path for path in (root / "README.md", root / "docs") if path.exists()]
    if found:
        documents = read_documents(found)
        yield from (document for document in documents if document.name.endswith(".md") and document.content.strip())
        return
    from importlib.metadata import metadata

    yield Document("README.md", str(metadata("gossip-mesh").json.get("description", "")).encode())


def ask_once(client: Client, tokens: int, seed: int, watch: Callable[[Run], None] = lambda run: None) -> Run:
    """Asks the question and reads the answer; `watch` is called after each chunk."""
    from mesh.answers import text_of
    from mesh.client_api import citations

    run = Run()
    begun = time.monotonic()
    with client.ask(
        QUESTION, STORE, top_k=PASSAGES, stream=True, seed=seed, max_tokens=tokens, ignore_eos=True, return_token_ids=True
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


def undisturbed(client: Client, tokens: int, seed: int) -> Run:
    """The reference: as long as it takes for a kill to fall into its middle."""
    run = ask_once(client, tokens, seed)
    while run.took_s - run.times_s[0] < LONG_ENOUGH_S and tokens < LONGEST_TOKENS:
        tokens *= 2
        run = ask_once(client, tokens, seed)
    return run


@dataclass(slots=True)
class Killer:
    """Kills a node of the path that is not the entry, once the answer is under way."""

    mesh: LocalMesh
    client: Client
    entry: LocalNode
    victim: LocalNode | None = None
    at_token: int = 0
    layers: str = ""

    def __call__(self, run: Run) -> None:
        if self.victim is not None or len(run.token_ids) < KILL_AFTER_TOKENS:
            return
        by_id = {seen["id"]: seen["http"] for seen in self.client.status()["nodes"]}
        for stage in self.client.why(run.stream)["path"]:
            for node in self.mesh.nodes:
                if node.http == by_id.get(stage["node"]) and node is not self.entry:
                    self.mesh.kill(node)
                    self.victim, self.at_token = node, len(run.token_ids)
                    self.layers = f"{stage['start']}:{stage['end']}"
                    return
        raise DemoFailed("expected a path over two nodes, got one that only the entry is on")


def describe_path(client: Client, run: Run) -> str:
    names = {seen["id"]: seen["name"] for seen in client.status()["nodes"]}
    stages = (
        f"{names.get(stage['node'], stage['node'])} [{stage['start']}:{stage['end']}]" for stage in run.mesh.get("path", ())
    )
    return " -> ".join(stages)


def compare(reference: Run, disturbed: Run, killer: Killer) -> None:
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
        raise DemoFailed("equal tokens, but the kill came too late to disturb the answer; try more --tokens")


def tell_sources(client: Client, story: output.Story, run: Run) -> None:
    """The passages that the answer cites, and those it was given. A model of random weights cites by accident only.

    Raises:
        DemoFailed: retrieval found nothing, or not all of the index answered.
    """
    if run.mesh.get("shards_ok") != run.mesh.get("shards_total") or "digest" not in run.mesh:
        raise DemoFailed(f"expected all shards of {STORE} to answer, got {run.mesh.get('shards_ok')}")
    passages = client.docs.search(STORE, QUESTION, top_k=PASSAGES)
    if not passages:
        raise DemoFailed("expected passages of the documents, found none")
    for citation in run.citations:
        story.say(f"[{citation['number']}] {citation['filename']}, characters {citation['start']}-{citation['end']}")
    if run.citations:
        return
    story.say("its text names none of its sources, as random weights would have it; it was given these:")
    for number, passage in enumerate(passages, 1):
        text = " ".join(" ".join(part.get("text", "") for part in passage.get("content", ())).split())
        story.say(f"[{number}] {passage['filename']} (score {passage['score']:.3f}): {text[:70]}…")


def perform(mesh: LocalMesh, story: output.Story, tokens: int, seed: int) -> None:
    """The demo's steps. Raises MeshError when one of them fails."""
    from cli.models import default_model
    from mesh.client import Client

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
        story.say(
            f"all ready after {since(begun)}. {model['id']} has random weights: its words mean nothing, only their sameness does"
        )

        begun = time.monotonic()
        story.step("The project's own documents go into the mesh")
        added = client.docs.add_documents(project_documents(), STORE)
        replicas, in_sync = wait_replicated(client)
        copies = f"{replicas} copies, {'in sync' if in_sync else 'not yet in sync'}"
        story.say(f"{len(added)} documents, {copies}, after {since(begun)}")

        story.step(f"A question to {entry.name}: {QUESTION}")
        reference = undisturbed(client, tokens, seed)
        rate = len(reference.token_ids) / reference.took_s
        story.say(f"undisturbed: {len(reference.token_ids)} tokens in {reference.took_s:.2f} s ({rate:.0f} a second)")
        story.say(f"path {describe_path(client, reference)}")
        story.quote(reference.text[:160] + "…")
        tell_sources(client, story, reference)

        story.step("The same question again, and a node on its path is killed in mid-answer")
        killer = Killer(mesh, client, entry)
        disturbed = ask_once(client, len(reference.token_ids), seed, killer)
        if killer.victim is not None:
            story.say(f"SIGKILL to {killer.victim.name} (layers {killer.layers} of the path) after token {killer.at_token}")
        story.say(f"path afterwards {describe_path(client, disturbed)}, attempts {disturbed.mesh.get('attempts')}")
        story.say(
            f"{len(disturbed.token_ids)} tokens in {disturbed.took_s:.2f} s, longest pause {disturbed.longest_gap_s():.2f} s"
        )
        compare(reference, disturbed, killer)


def demo(
    tokens: Annotated[int, typer.Option("--tokens", min=32, max=LONGEST_TOKENS, help="Length of the answer.")] = 96,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampling.")] = 7,
    logs: Annotated[Path | None, typer.Option("--logs", metavar="DIR", help="Keep the nodes' logs and files here.")] = None,
) -> None:
    """Three nodes on this machine, a question, a kill in mid-answer, the same answer. Exit code 0 only if it was the same."""
    from cli.local_mesh import LocalMesh

    story = output.Story()
    story.title("A mesh of three nodes, one of which is about to die")
    begun = time.monotonic()
    with LocalMesh(logs) as mesh:
        try:
            perform(mesh, story, tokens, seed)
        except MeshError as error:
            for node in mesh.nodes:
                output.note(f"--- {node.name}: {node.log_tail()}")
            story.verdict(f"Failed: {str(error).splitlines()[0]}", good=False)
            raise typer.Exit(1) from None
    took_s = time.monotonic() - begun
    story.verdict(f"Token for token the same answer. Everything has ended; the demo took {took_s:.1f} s.", good=True)
