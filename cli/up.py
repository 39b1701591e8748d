"""`mesh up` and `mesh join`: run a node in the foreground."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import config_file, options, output
from mesh.errors import BadRequest
from mesh.json_object import JsonObject

if TYPE_CHECKING:
    from node.config import NodeConfig

FILE = "mesh.config"  # where the context keeps what --config holds
SIZES = ("memory", "spill_memory", "spill_disk", "upload")

ModelsOption = Annotated[
    list[str],
    typer.Option(
        "--model",
        metavar="REF",
        help="A model directory, NAME=DIR, or the id of a model that peers serve; repeatable. Else the default model.",
    ),
]
LayersOption = Annotated[str, typer.Option("--layers", help="auto, none, or the layers to hold: A:B or A:B,C:D (end excluded).")]
BindOption = Annotated[str, typer.Option("--bind", metavar="HOST:PORT", help="Gossip (UDP) and peer links (TCP); port 0: any.")]
HttpOption = Annotated[str, typer.Option("--http", metavar="HOST:PORT", help="The OpenAI-compatible endpoint; port 0: any.")]
NameOption = Annotated[str, typer.Option("--name", help="What people call the node; the host's name when not given.")]
RegionOption = Annotated[str, typer.Option("--region", help="Where the node is; paths within a region are preferred.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N; auto: the CPU.")]
GraphsOption = Annotated[bool, typer.Option("--graphs/--no-graphs", help="On a GPU: record decoding steps, play them again.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16, or a kernel by its name, e.g. fbgemm-fp16.")]
QuantizeOption = Annotated[str, typer.Option("--quantize", help="none, int8 or int4: how weights are held.")]
TensorParallelOption = Annotated[
    int, typer.Option("--tensor-parallel", metavar="N", help="Worker processes that compute each span together; 1: none.")
]
GenerationConfigOption = Annotated[
    str,
    typer.Option("--generation-config", help="auto: a model's own sampling defaults hold where a request sets none; or none."),
]
MemoryOption = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="For weights and KV cache, such as 8GiB; else half of what is free."),
]
SpillMemoryOption = Annotated[
    str | None,
    typer.Option("--spill-memory", metavar="SIZE", help="Host memory for prompt beginnings that the KV cache has no room for."),
]
SpillDiskOption = Annotated[
    str | None,
    typer.Option("--spill-disk", metavar="SIZE", help="Disk for those, in the data directory; deleted when the node ends."),
]
UploadOption = Annotated[
    str | None,
    typer.Option("--upload", metavar="SIZE", help="Bytes a second of weights for peers; else 64MiB while it computes."),
]
DataDirOption = Annotated[
    Path | None, typer.Option("--data-dir", metavar="DIR", help="Identity, documents, weights; default: per user and name.")
]
NewIdentityOption = Annotated[
    bool, typer.Option("--new-identity", help="Be a new node: for a data directory that was copied from another one. Once.")
]
KeyFileOption = Annotated[Path | None, typer.Option("--key-file", metavar="F", help="The mesh secret, from `mesh key new`.")]
ApiKeyFileOption = Annotated[Path | None, typer.Option("--api-key-file", metavar="F", help="API keys, from `mesh key api`.")]
DrainOption = Annotated[float, typer.Option("--drain-s", min=0.0, help="How long open streams may go on after SIGTERM.")]
LogFormatOption = Annotated[str, typer.Option("--log-format", help="text or json; logs go to stderr.")]
TraceOption = Annotated[
    int,
    typer.Option(
        "--trace-mb",
        min=0,
        max=4096,
        metavar="MB",
        help="Keep what membership hears; SIGUSR1 writes it to DATA_DIR/membership.trace, for `mesh simulate --replay`.",
    ),
]
ParentOption = Annotated[int | None, typer.Option("--exit-with-parent", hidden=True)]


def read_config(ctx: typer.Context, path: Path | None) -> config_file.Config | None:
    """Makes the file's values the defaults of the options: what is typed wins.

    Raises:
        typer.BadParameter: as `config_file.read`.
    """
    if path is None:
        return None
    options = {
        str(param.name): param for param in ctx.command.params if param.name not in ("config", "exit_with_parent", "address")
    }
    read = config_file.read(path, options)
    ctx.default_map = {**(ctx.default_map or {}), **read.values}
    ctx.meta[FILE] = read
    return read


ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", callback=read_config, is_eager=True, help="TOML, with the options' names."),
]


def up(
    ctx: typer.Context,
    config: ConfigOption = None,
    join: Annotated[
        list[str], typer.Option("--join", metavar="HOST:PORT", help="The gossip address of any node; repeatable.")
    ] = [],  # noqa: B006
    model: ModelsOption = [],  # noqa: B006
    layers: LayersOption = "auto",
    bind: BindOption = "127.0.0.1:7946",
    http: HttpOption = "127.0.0.1:8000",
    name: NameOption = "",
    region: RegionOption = "",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = "none",
    graphs: GraphsOption = True,
    tensor_parallel: TensorParallelOption = 1,
    generation_config: GenerationConfigOption = "auto",
    memory: MemoryOption = None,
    spill_memory: SpillMemoryOption = None,
    spill_disk: SpillDiskOption = None,
    upload: UploadOption = None,
    data_dir: DataDirOption = None,
    new_identity: NewIdentityOption = False,
    key_file: KeyFileOption = None,
    api_key_file: ApiKeyFileOption = None,
    drain_s: DrainOption = 30.0,
    log_format: LogFormatOption = "text",
    trace_mb: TraceOption = 0,
    exit_with_parent: ParentOption = None,
) -> None:
    """Run a node in the foreground; SIGTERM or Ctrl-C drains it and leaves the mesh."""
    start({name: value for name, value in locals().items() if name not in ("config", "ctx")}, ctx)


def join(
    ctx: typer.Context,
    address: Annotated[list[str], typer.Argument(metavar="HOST:PORT...", help="The gossip address of any node.")],
    config: ConfigOption = None,
    model: ModelsOption = [],  # noqa: B006
    layers: LayersOption = "auto",
    bind: BindOption = "127.0.0.1:7946",
    http: HttpOption = "127.0.0.1:8000",
    name: NameOption = "",
    region: RegionOption = "",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = "none",
    graphs: GraphsOption = True,
    tensor_parallel: TensorParallelOption = 1,
    generation_config: GenerationConfigOption = "auto",
    memory: MemoryOption = None,
    spill_memory: SpillMemoryOption = None,
    spill_disk: SpillDiskOption = None,
    upload: UploadOption = None,
    data_dir: DataDirOption = None,
    new_identity: NewIdentityOption = False,
    key_file: KeyFileOption = None,
    api_key_file: ApiKeyFileOption = None,
    drain_s: DrainOption = 30.0,
    log_format: LogFormatOption = "text",
    trace_mb: TraceOption = 0,
    exit_with_parent: ParentOption = None,
) -> None:
    """Run a node that joins a mesh: `mesh up --join HOST:PORT`."""
    given = {name: value for name, value in locals().items() if name not in ("config", "ctx", "address")}
    start({**given, "join": address}, ctx)


def start(given: JsonObject, ctx: typer.Context) -> None:
    """Runs the node until it has left; then the process ends.

    Raises:
        BadRequest: an option has another form than expected; with file and line where it stands in `--config`.
    """
    try:
        config = configuration(given)
    except BadRequest as error:
        file: config_file.Config | None = ctx.meta.get(FILE)
        raise (file.named(error, ctx) if file is not None else error) from None
    if (parent_fd := given["exit_with_parent"]) is not None:
        from node.host import parent_watch

        parent_watch.exit_with_parent(parent_fd)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # nothing is taken yet, and the imports below take seconds
    from node.main import run  # imports torch and trio: after all that can be wrong with the options

    run(config, output.line)


def configuration(given: JsonObject) -> NodeConfig:
    """What the options say. Raises BadRequest, naming the option."""
    from node.config import NodeConfig

    sizes = {name: given[name] for name in SIZES}
    read = {name: options.size_bytes(text, "--" + name.replace("_", "-")) for name, text in sizes.items() if text is not None}
    return NodeConfig(
        **{
            **{name: value for name, value in given.items() if name not in ("exit_with_parent", "model", *SIZES)},
            "join": tuple(options.address(text, "--join") for text in given["join"]),
            "bind": options.address(given["bind"], "--bind"),
            "http": options.address(given["http"], "--http"),
            "memory_bytes": read.get("memory"),
            "spill_memory_bytes": read.get("spill_memory", 0),
            "spill_disk_bytes": read.get("spill_disk", 0),
            "upload_bytes_s": read.get("upload"),
            "models": tuple(given["model"]),
            "key_file": options.existing_file(given["key_file"], "--key-file"),
            "api_key_file": options.existing_file(given["api_key_file"], "--api-key-file"),
        }
    )
