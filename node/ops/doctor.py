"""What is wrong with a mesh as one node sees it, and what to do, in plain words: a pure function of what was looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mesh.errors import ModelLoading
from mesh.ids import ModelId, NodeId, format_address
from mesh.keys.seal import REPLAY_WINDOW_S, SealFault
from mesh.links.refusals import BAD_ACTIVATIONS, MAX_COUNTED, UNAUTHORIZED_FRAME, Refusal
from mesh.versions import NAME_DIGITS, ModelVersion, holds, replicas, versions
from mesh.view import ModelCard, Peer, PeerState, Readiness, View
from node.host.uncompiled import COSTS, remedy
from node.reports import Finding
from rag.types import StoreInfo
from routing.loading import no_path

PROBLEM, NOTE = "problem", "note"
SKEW_S = 5.0  # between two clocks: beyond it something is wrong, long before the seal refuses anything
FREE_BYTES_LOW = 1 << 30
MAX_NAMED = 8  # nodes of one version in one sentence
LAYER_COPIES_WANTED = 2  # so that any one node may die

# A refusal's reason -> (what the datagrams are, what to do). What is not here is a sentence already: a link's refusal.
_DATAGRAMS = {
    SealFault.WRONG_KEY: (
        "are sealed with another mesh key, or with none",
        "copy the key file of a node of this mesh to {who} and start it with --key-file; one that was down while the key was "
        "rotated needs the file as it is now",
    ),
    SealFault.WRONG_CLUSTER: (
        "are of a mesh with another cluster label",
        "these are two meshes: give {who} the label of this one, or take the address out of its --join",
    ),
    SealFault.OTHER_VERSION: ("are of another version of the mesh's protocol", "run the same release on {who} and here"),
    SealFault.FOREIGN: ("are not of a mesh", "find out what on {who} sends to this port"),
    SealFault.DAMAGED: (
        "were altered on their way, or forged",
        "look at the network between here and {who}: no honest node makes such",
    ),
    SealFault.REPLAYED: (
        f"were seen before, or were sealed more than {REPLAY_WINDOW_S:g} s before or after now",
        "set the clocks of {who} and of this machine (NTP)",
    ),
    "malformed": ("open under the mesh key but are no gossip", "run the same release on {who}"),
}


@dataclass(frozen=True, slots=True)
class Observations:
    """All that was looked at."""

    view: View
    refusals: Sequence[Refusal] = ()
    skews_s: Mapping[NodeId, float | None] = field(default_factory=dict)  # peers' clocks against ours; None: no answer
    missing_layers: Mapping[ModelId, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    not_ready: str | None = None
    stores: Sequence[StoreInfo] = ()
    store_copies_wanted: int = 3
    keyless: bool = False
    key_saved: bool = True
    keys_on_ring: int = 1
    free_bytes: int | None = None  # where the data directory lies
    not_written: str = ""  # why the data directory keeps nothing, if it does not
    changed_files: Mapping[ModelId, str] = field(default_factory=dict)  # of this node's models; why they were hashed again


def diagnosis(look: Observations) -> list[Finding]:
    """Problems first, each kind in the order in which one would look for it."""
    found = [
        *_refused(look),
        *_keys(look),
        *_versions(look.view),
        *_clocks(look),
        *_nodes(look.view),
        *_models(look),
        *_uncompiled(look.view),
        *_documents(look),
        *_disk(look),
    ]
    return sorted(found, key=lambda finding: finding.severity != PROBLEM)


def _refused(look: Observations) -> Iterator[Finding]:
    names = {peer.address[0]: peer.name for peer in look.view.live() if peer.id != look.view.me}
    hosts = Counter(peer.address[0] for peer in look.view.live())
    for refusal in look.refusals:
        who = f"{names[refusal.host]} ({refusal.host})" if hosts[refusal.host] == 1 and refusal.host in names else refusal.host
        often = f"{refusal.count}{' or more' if refusal.count >= MAX_COUNTED else ''}"
        if refusal.reason in _DATAGRAMS:
            what, do = _DATAGRAMS[refusal.reason]
            yield Finding(PROBLEM, "keys", f"{often} datagrams in the last minute from {who} {what}", do.format(who=who))
        elif refusal.reason == "too long":
            yield Finding(NOTE, "links", f"{often} datagrams in the last minute from {who} were longer than any of a mesh", "")
        elif refusal.reason == UNAUTHORIZED_FRAME:
            what = f"{often} times in the last minute {_name(look.view, NodeId(refusal.host))} was not believed: {refusal.reason}"
            do = "one or two may be late; more are of a node gone wrong or taken over: stop it, then run mesh key rotate"
            yield Finding(PROBLEM, "nodes", what, do)
        elif refusal.reason == BAD_ACTIVATIONS:
            what = f"{often} times in the last minute {_name(look.view, NodeId(refusal.host))} failed others: {refusal.reason}"
            do = "its memory or its release may be faulty: stop it, test the machine's memory, see that it runs this release"
            yield Finding(PROBLEM, "nodes", what, do)
        else:
            do = f"see that {who} has this mesh's key file, cluster label and release"
            yield Finding(PROBLEM, "links", f"{often} links in the last minute with {who} failed: {refusal.reason}", do)


def _keys(look: Observations) -> Iterator[Finding]:
    if look.keyless:
        do = "enough on one machine; for more: mesh key new FILE, copy it to every node, start all with --key-file FILE"
        yield Finding(NOTE, "keys", "this node has no mesh key, so it listens on loopback only", do)
    if not look.key_saved:
        do = "make the key file writable and run mesh key rotate, or copy a peer's key file here before the next restart"
        yield Finding(PROBLEM, "keys", "the mesh key was rotated and this node could not write its key file", do)
    if look.keys_on_ring > 1:
        do = "run mesh key rotate: it goes on from where it stopped"
        what = f"a rotation of the mesh key was begun and not ended: {look.keys_on_ring} keys are valid"
        yield Finding(PROBLEM, "keys", what, do)


def _versions(view: View) -> Iterator[Finding]:
    by_version: dict[str, list[str]] = {}
    for peer in view.live():
        if peer.facts.version:
            by_version.setdefault(peer.facts.version, []).append(peer.name)
    if len(by_version) > 1:
        releases = "; ".join(f"{version} on {', '.join(sorted(names))}" for version, names in sorted(by_version.items()))
        yield Finding(PROBLEM, "versions", f"nodes run different releases: {releases}", "run the same release on all of them")


def _clocks(look: Observations) -> Iterator[Finding]:
    for node, skew_s in sorted(look.skews_s.items()):
        name = _name(look.view, node)
        if skew_s is None:
            what = f"{name} answers gossip but no call: its TCP port is closed to this node, or it is overloaded"
            yield Finding(PROBLEM, "links", what, f"let TCP through to {name} on the port of its gossip address")
        elif abs(skew_s) > SKEW_S:
            way = "ahead of" if skew_s > 0 else "behind"
            what = (
                f"the clock of {name} is {abs(skew_s):.0f} s {way} this machine's; from {REPLAY_WINDOW_S:g} s on nothing is heard"
            )
            yield Finding(PROBLEM, "clocks", what, "set the clocks of both (NTP)")


def _nodes(view: View) -> Iterator[Finding]:
    for peer in sorted(view.peers.values(), key=lambda peer: (peer.name, peer.id)):
        if peer.facts.twin and view.is_live(peer.id):
            what = (
                f"two processes have the identity {peer.id}: {peer.name} at {format_address(peer.address)}, and "
                f"{peer.facts.twin}; a data directory was copied, or an image cloned"
            )
            do = "start the copy with --new-identity; the younger one ends by itself, and this is told for ten minutes"
            yield Finding(PROBLEM, "nodes", what, do)
        match peer.state:
            case PeerState.SUSPECT if peer.cause == "stalled":
                what = f"{peer.name} is silent, though its process still listens: it hangs, or its datagrams are lost"
                yield Finding(PROBLEM, "nodes", what, f"look at {peer.name}; let UDP through to its gossip port")
            case PeerState.SUSPECT:
                what = f"{peer.name} does not answer, and is dead soon unless it does"
                yield Finding(PROBLEM, "nodes", what, f"look at {peer.name} and the network to it")
            case PeerState.DEAD:
                why = "its process has ended" if peer.cause == "refused" else "it fell silent"
                do = "start it again; if it is gone for good, it is forgotten after three days"
                yield Finding(PROBLEM, "nodes", f"{peer.name} is dead: {why}", do)
            case PeerState.ALIVE if peer.facts.readiness is Readiness.STALLED:
                what = f"{peer.name} is stalled: its engine makes no progress"
                yield Finding(PROBLEM, "nodes", what, f"look at the log of {peer.name}; restart it if it does not recover")
            case PeerState.ALIVE if peer.facts.readiness is Readiness.OVERLOADED:
                what = f"{peer.name} is overloaded: its KV blocks are full and requests wait"
                yield Finding(NOTE, "nodes", what, "add a node that holds the same layers, or give it more --memory")
            case _:
                pass
    if sum(1 for _ in view.live()) == 1 and len(view.peers) == 1:
        yield Finding(NOTE, "nodes", "this node is alone", "start another with: mesh up --join HOST:PORT")


def _models(look: Observations) -> Iterator[Finding]:
    known = versions(look.view)
    for version in known:
        yield from _layers(look, version)
    for model in sorted({version.card.id for version in known if not version.answers}):
        yield _several(look.view, model, [version for version in known if version.card.id == model])
    for model, why in sorted(look.changed_files.items()):
        do = "look at the disk of this node, or at what wrote the file, and copy the model's files here again if they are damaged"
        what = f"the files of {model} on this node are not those that it began with: {why}"
        yield Finding(PROBLEM, "models", what, do)
    if look.not_ready and not look.missing_layers:
        yield Finding(PROBLEM, "models", f"this node is not ready: {look.not_ready}", "see its log")


def _uncompiled(view: View) -> Iterator[Finding]:
    """Nodes that compute without the compiled kernel, those with one reason together."""
    names: dict[str, list[str]] = {}
    for peer in view.live():
        if peer.facts.uncompiled:
            names.setdefault(peer.facts.uncompiled, []).append(peer.name)
    for why, some in sorted(names.items()):
        more = f" and {len(some) - MAX_NAMED} more" if len(some) > MAX_NAMED else ""
        nodes = ", ".join(sorted(some)[:MAX_NAMED])
        what = f"without the compiled kernel: {nodes}{more} ({why}); {COSTS}"
        yield Finding(NOTE, "nodes", what, remedy(why))


def _layers(look: Observations, version: ModelVersion) -> Iterator[Finding]:
    """Of one version, which layers are held too few times. One that does not answer to its id is worth a note at most."""
    live, card, name = sum(1 for _ in look.view.live()), version.card, ModelId(version.name)
    gaps = look.missing_layers.get(name)
    if gaps and isinstance(why := no_path(look.view, card.id, gaps, card.weights), ModelLoading):
        yield Finding(NOTE, "models", f"it cannot answer yet: {why}", "wait; see the log of the node that loads if it lasts")
    elif gaps:
        layers = ", ".join(f"{start}:{end}" for start, end in gaps)
        do = f"start a node that holds them: mesh up --join HOST:PORT --model {name} --layers {gaps[0][0]}:{gaps[0][1]}"
        severity = PROBLEM if version.answers else NOTE
        yield Finding(severity, "models", f"no live node holds layers {layers} of {name}: it cannot answer", do)
    elif (copies := min(replicas(look.view, card), default=0)) < LAYER_COPIES_WANTED:
        what = f"some layers of {name} are held {copies} time{'' if copies == 1 else 's'}: the next death stops it"
        severity = PROBLEM if live > 1 and version.answers else NOTE
        do = "add a node, or give the others more --memory" if live > 1 else "add a node"
        do = f"{do}; {LAYER_COPIES_WANTED} copies of each layer are wanted{_room(look.view, card)}"
        yield Finding(severity, "models", what, do)


def _several(view: View, model: ModelId, found: Sequence[ModelVersion]) -> Finding:
    """Two or more sets of weights under one id: which nodes have which, and which of them answers."""
    described = []
    for version in found:
        names = ", ".join(_name(view, node) for node in version.known_to[:MAX_NAMED])
        more = f" and {len(version.known_to) - MAX_NAMED} more" if len(version.known_to) > MAX_NAMED else ""
        answer = f"answers to {model}" if version.answers else f"is asked for as {version.name}"
        described.append(f"{version.card.weights[:NAME_DIGITS]} (on {names}{more}; {len(version.holders)} serve it) {answer}")
    what = f"{len(found)} sets of weights are called {model}, and they are no replicas of each other: {'; '.join(described)}"
    do = (
        "give all nodes the same files, or start those with others under another name: mesh up --model NAME=DIR. "
        "A version whose layers are all held comes first, then the one that more nodes serve, then the newer"
    )
    return Finding(PROBLEM, "models", what, do)


def _room(view: View, card: ModelCard) -> str:
    room = sum(peer.facts.capacity.get(card.id, 0) for peer in view.live() if holds(peer, card))
    return f"; the live nodes have room for {room} layers of it" if room else ""


def _documents(look: Observations) -> Iterator[Finding]:
    live = sum(1 for _ in look.view.live())
    for store in look.stores:
        if store.replicas < look.store_copies_wanted:
            what = f"store {store.name} is held {store.replicas} times where {look.store_copies_wanted} are wanted"
            severity = PROBLEM if live >= look.store_copies_wanted else NOTE
            do = (
                "wait for the repair; see the logs if it does not come"
                if severity == PROBLEM
                else f"only {live} nodes live: add some"
            )
            yield Finding(severity, "documents", what, do)
        if not store.in_sync:
            do = "the repair is under way; if it lasts, look at the links and disks of the nodes"
            yield Finding(NOTE, "documents", f"replicas of store {store.name} differ", do)


def _disk(look: Observations) -> Iterator[Finding]:
    if look.not_written:
        do = "make room or make it writable: until then documents are refused and a restart loses this node's identity"
        yield Finding(PROBLEM, "disk", f"the data directory cannot be written: {look.not_written}", do)
    elif look.free_bytes is not None and look.free_bytes < FREE_BYTES_LOW:
        what = f"{look.free_bytes / 2**20:.0f} MiB are free where the data directory lies"
        yield Finding(PROBLEM, "disk", what, "make room, or move it with --data-dir")


def _name(view: View, node: NodeId) -> str:
    peer: Peer | None = view.peers.get(node)
    return peer.name if peer is not None and peer.name else node
