"""What `mesh up` makes of its options; the node itself is not started."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from cli.options import size_bytes
from mesh.errors import BadRequest
from node.config import NodeConfig


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[NodeConfig]:
    """The configurations of the nodes that were started, in place of the nodes."""
    configs: list[NodeConfig] = []
    fake = ModuleType("node.main")

    def run(config: NodeConfig, announce: object) -> None:
        configs.append(config)
        assert callable(announce)
        announce("mesh node a up: http://127.0.0.1:1 gossip 127.0.0.1:2")

    fake.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "node.main", fake)
    return configs


def mesh_command(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def test_without_options_a_node_gets_the_defaults(started: list[NodeConfig]) -> None:
    result = mesh_command("up")
    assert result.exit_code == 0
    assert result.stdout == "mesh node a up: http://127.0.0.1:1 gossip 127.0.0.1:2\n"
    assert started == [NodeConfig()]


def test_options_become_the_configuration(started: list[NodeConfig], tmp_path: Path) -> None:
    (tmp_path / "key").touch()
    words = "up --name n --region r --bind 127.0.0.1:0 --http :0 --join 10.0.0.1:7946 --join [::1]:2 --model /m --model x=/n"
    spill = ["--spill-memory", "1GiB", "--spill-disk", "50GB"]
    more = [*spill, "--layers", "0:2,4:6", "--memory", "2GiB", "--data-dir", str(tmp_path), "--key-file", str(tmp_path / "key")]
    assert (
        mesh_command(
            *words.split(),
            *more,
            "--drain-s",
            "5",
            "--log-format",
            "json",
            "--dtype",
            "float32",
            "--quantize",
            "int8",
            "--tensor-parallel",
            "2",
            "--generation-config",
            "none",
            "--no-graphs",
        ).exit_code
        == 0
    )
    assert started == [
        NodeConfig(
            name="n",
            region="r",
            bind=("127.0.0.1", 0),
            http=("127.0.0.1", 0),
            join=(("10.0.0.1", 7946), ("::1", 2)),
            models=("/m", "x=/n"),
            layers="0:2,4:6",
            memory_bytes=2 << 30,
            spill_memory_bytes=1 << 30,
            spill_disk_bytes=50 * 10**9,
            data_dir=tmp_path,
            key_file=tmp_path / "key",
            drain_s=5.0,
            log_format="json",
            dtype="float32",
            quantize="int8",
            tensor_parallel=2,
            generation_config="none",
            graphs=False,
        )
    ]


def test_join_is_up_with_an_address(started: list[NodeConfig]) -> None:
    assert mesh_command("join", "127.0.0.1:1", "--http", "127.0.0.1:0").exit_code == 0
    assert mesh_command("up", "--join", "127.0.0.1:1", "--http", "127.0.0.1:0").exit_code == 0
    assert started[0] == started[1]


def test_a_configuration_file_gives_defaults_that_options_override(started: list[NodeConfig], tmp_path: Path) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text('name = "from-file"\nregion = "r"\njoin = ["127.0.0.1:1", "127.0.0.1:2"]\ndrain-s = 3\n')
    assert mesh_command("up", "--config", str(file), "--name", "typed").exit_code == 0
    assert started == [NodeConfig(name="typed", region="r", join=(("127.0.0.1", 1), ("127.0.0.1", 2)), drain_s=3.0)]


@pytest.mark.parametrize("text", ['naem = "x"', "= nothing", "leash = 3"])
def test_a_configuration_file_with_a_mistake_is_a_usage_error(started: list[NodeConfig], tmp_path: Path, text: str) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text(text)
    assert mesh_command("up", "--config", str(file)).exit_code == 2
    assert started == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--bind here", "--bind: expected HOST:PORT"),
        ("--http 127.0.0.1:70000", "--http: expected HOST:PORT"),
        ("--join nowhere", "--join: expected HOST:PORT"),
        ("--layers 4:2", "--layers '4:2': expected auto, none"),
        ("--memory lots", "--memory: expected a size"),
        ("--key-file /no/such/file", "--key-file: expected a file"),
        ("--bind 0.0.0.0:1", "without a mesh key"),
    ],
)
def test_a_wrong_option_is_told_in_one_line(started: list[NodeConfig], words: str, told: str) -> None:
    result = mesh_command("up", *words.split())
    assert result.exit_code == 1
    assert told in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert started == []


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1500000", 1_500_000),
        ("512MiB", 512 << 20),
        ("2G", 2 << 30),
        ("2GB", 2_000_000_000),
        ("1.5g", 3 << 29),
        ("64 kib", 64 << 10),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert size_bytes(text, "--memory") == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1 2", "1.2.3", "3X"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="expected a size"):
        size_bytes(text, "--memory")


def test_the_example_configuration_is_one(started: list[NodeConfig]) -> None:
    example = Path(__file__).parents[2] / "examples" / "mesh.toml"
    assert mesh_command("up", "--config", str(example)).exit_code == 0
    assert started == [NodeConfig(name="one", region="home")]
