"""What one node is told at its start.

Each field: unit, default, reason. Values are checked here once, so the rest may trust them.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from mesh.errors import BadRequest
from mesh.ids import Address, is_ip
from mesh.wire.gossip import check_description
from node.engine.model.shard_plan import MAX_RANKS
from node.host.environment import cpu_isa

KERNEL_NAMES = (  # of node.engine.model.linear, which imports torch: what --dtype may name
    *("mesh-bf16", "mesh-fp32", "mesh-int8", "mesh-int4", "mesh-int8-fp32", "mesh-int4-fp32", "aten-int8"),
    *("onednn-fp32", "onednn-bf16", "fbgemm-fp16", "aten-fp32", "aten-bf16", "cuda-bf16", "cuda-bf16-tiled", "cuda-fp32"),
)
LAYERS_FORM = "expected auto, none, A:B or A:B,C:D with 0 <= A < B"


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """Everything `mesh up` can set; see `docs/cli.md`."""

    name: str = ""  # empty: the host's name and the first digits of the node's id
    region: str = ""
    bind: Address = ("127.0.0.1", 7946)  # gossip (UDP) and peer links (TCP); port 0: any free one
    http: Address = ("127.0.0.1", 8000)
    join: tuple[Address, ...] = ()
    models: tuple[str, ...] = ()  # a directory, NAME=DIR or the id of a peers' model each; none: the small default model
    layers: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    graphs: bool = True  # on a GPU: decoding steps are recorded and played again
    quantize: str = "none"  # int8 and int4 round the weights: less memory, faster decoding, other tokens
    tensor_parallel: int = 1  # worker processes that compute a span together; 1: the node itself does
    generation_config: str = "auto"  # a model's own sampling defaults hold where a request sets none; none: they never do
    memory_bytes: int | None = None  # for weights and KV together; None: half of what is free at the start
    spill_memory_bytes: int = 0  # beside `memory_bytes`, for pages that the KV cache has no room for; 0: they are dropped
    spill_disk_bytes: int = 0  # for those the memory has no room for, in files under the data directory
    data_dir: Path | None = None  # identity and documents; None: one of its own under the user's data directory
    new_identity: bool = False  # the directory's own is replaced: it is a copy of another node's
    key_file: Path | None = None
    api_key_file: Path | None = None
    cluster: str = "mesh"  # label: nodes of another label are refused
    threads: int = 1  # torch threads; several nodes on one machine must take 1 each
    drain_s: float = 30.0  # how long open streams may go on after SIGTERM
    upload_bytes_s: int | None = None  # weights for peers; None: bounded while this node computes, else all but unbounded
    request_timeout_s: float = 600.0  # a request's own deadline where the client set none
    log_format: str = "text"
    trace_mb: int = 0  # of what membership hears, kept in memory for a replay of an incident; 0: nothing

    def __post_init__(self) -> None:
        """Raises BadRequest with what was expected, what came and what to do."""
        pinned_spans(self.layers)
        cpu_isa()
        try:
            check_description(self.name, self.bind[0], self.region)
        except ValueError as error:
            raise BadRequest(str(error)) from None
        if self.log_format not in ("text", "json"):
            raise BadRequest(f"--log-format: expected text or json, got {self.log_format!r}", "log_format")
        if self.dtype not in ("auto", "float32", "bfloat16", *KERNEL_NAMES):
            said = f"--dtype: expected auto, float32, bfloat16 or a kernel ({', '.join(KERNEL_NAMES)}), got {self.dtype!r}"
            raise BadRequest(said, "dtype")
        if self.quantize not in ("none", "int8", "int4"):
            raise BadRequest(f"--quantize: expected none, int8 or int4, got {self.quantize!r}", "quantize")
        if self.generation_config not in ("auto", "none"):
            raise BadRequest(f"--generation-config: expected auto or none, got {self.generation_config!r}", "generation_config")
        if not 0 <= self.trace_mb <= 4096:
            raise BadRequest(f"--trace-mb: expected 0 to 4096, got {self.trace_mb}", "trace_mb")
        if not 1 <= self.tensor_parallel <= MAX_RANKS:
            said = f"--tensor-parallel: expected 1 to {MAX_RANKS} workers, got {self.tensor_parallel}"
            raise BadRequest(said, "tensor_parallel")
        if self.memory_bytes is not None and self.memory_bytes < 16 << 20:
            raise BadRequest(f"--memory: expected at least 16MiB, got {self.memory_bytes} bytes", "memory")
        if self.upload_bytes_s is not None and self.upload_bytes_s < 1 << 10:
            raise BadRequest(f"--upload: expected at least 1KiB a second, got {self.upload_bytes_s} bytes", "upload")
        if self.key_file is None and not is_loopback(self.bind[0]):
            raise BadRequest(
                f"--bind {self.bind[0]}: without a mesh key a node listens on loopback only, since anyone who reaches it could "
                "join; make one with `mesh key new` and give it to every node with --key-file",
                "bind",
            )
        if self.key_file is None and not is_loopback(self.http[0]):
            raise BadRequest(
                f"--http {self.http[0]}: without a mesh key a node listens on loopback only; make one with `mesh key new` and "
                "give it with --key-file; and make API keys with `mesh key api`, or whoever reaches the endpoint may use it",
                "http",
            )


def is_loopback(host: str) -> bool:
    return host == "localhost" or (is_ip(host) and ip_address(host).is_loopback)


def pinned_spans(layers: str) -> tuple[tuple[int, int], ...] | None:
    """The spans that `--layers` pins; empty for `none`; None for `auto`.

    Raises:
        BadRequest: when the text has another form.
    """
    if layers == "auto":
        return None
    if layers == "none":
        return ()
    spans = []
    for part in layers.split(","):
        start, colon, end = part.partition(":")
        if not (colon and start.isdecimal() and end.isdecimal() and int(start) < int(end)):
            raise BadRequest(f"--layers {layers!r}: {LAYERS_FORM}", "layers")
        spans.append((int(start), int(end)))
    return tuple(spans)
