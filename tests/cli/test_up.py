"""What `mesh up` makes of its options; the node itself is not started."""

from __future__ import annotations

from dataclasses import replace
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


def mesh_command(*words: str, **environment: str) -> Result:
    return CliRunner().invoke(app, list(words), env=environment)


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


@pytest.mark.parametrize("text", ['naem = "x"', "= nothing", "exit_with_parent = 3"])
def test_a_configuration_file_with_a_mistake_is_a_usage_error(started: list[NodeConfig], tmp_path: Path, text: str) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text(text)
    assert mesh_command("up", "--config", str(file)).exit_code == 2
    assert started == []


PLAIN = NodeConfig(name="x")
WRITTEN = 'name = "x"\n'


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ('join = "127.0.0.1:1"', replace(PLAIN, join=(("127.0.0.1", 1),))),
        ('model = "a=/m"', replace(PLAIN, models=("a=/m",))),
        ('tensor-parallel = "2"', replace(PLAIN, tensor_parallel=2)),
        ('drain_s = "1.5"', replace(PLAIN, drain_s=1.5)),
        ("drain_s = 3", replace(PLAIN, drain_s=3.0)),
        ("memory = 67108864", replace(PLAIN, memory_bytes=64 << 20)),
        ("region = 7", replace(PLAIN, region="7")),
        ("graphs = false", replace(PLAIN, graphs=False)),
        ('graphs = "no"', replace(PLAIN, graphs=False)),
        ('new-identity = "True"', replace(PLAIN, new_identity=True)),
        ('"log-format" = "json"', replace(PLAIN, log_format="json")),
    ],
)
def test_a_value_stands_in_a_file_in_any_shape_that_says_it(
    started: list[NodeConfig], tmp_path: Path, text: str, config: NodeConfig
) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text(WRITTEN + text)
    result = mesh_command("up", "--config", str(file))
    assert result.exit_code == 0, result.output
    assert started == [config]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_a_file_may_begin_with_a_byte_order_mark_and_end_its_lines_as_it_likes(
    started: list[NodeConfig], tmp_path: Path, encoding: str, newline: str
) -> None:
    file = tmp_path / "mesh.toml"
    file.write_bytes(f'name = "ü"{newline}# a comment{newline}layers = "none"{newline}'.encode(encoding))
    result = mesh_command("up", "--config", str(file))
    assert result.exit_code == 0, result.output
    assert started == [NodeConfig(name="ü", layers="none")]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('jion = "127.0.0.1:1"', "line 2, jion: there is no such option; did you mean 'join'?"),
        ("zzz = 1", "line 2, zzz: there is no such option; there are api-key-file,"),
        ('[network]\nbind = "127.0.0.1:1"', "line 2, network: expected the options at the top level, got the table [network]"),
        ('[[node]]\nname = "y"', "line 2, node: expected the options at the top level"),
        ("[name2.deep]\na = 1", "line 2, name2: expected the options at the top level"),
        ("join = [1, true]", "line 2, join: expected a text, or a list of texts, got true or false: True"),
        ('layers = ["0:2"]', "line 2, layers: expected a text, got a list: ['0:2']"),
        ("bind.host = 1", "line 2, bind: expected a text, got a table"),
        ('graphs = "perhaps"', "line 2, graphs: expected true or false, got a text: 'perhaps'"),
        ("graphs = 2", "line 2, graphs: expected true or false, got a whole number: 2"),
        ("tensor-parallel = 1.5", "line 2, tensor-parallel: expected a whole number, got a number: 1.5"),
        ('tensor-parallel = "two"', "line 2, tensor-parallel: expected a whole number, got a text: 'two'"),
        ("drain-s = true", "line 2, drain-s: expected a number, got true or false: True"),
        ("region = 1979-05-27", "line 2, region: expected a text, got date"),
        ('region = "a"\nkey-file = "k"\nkey_file = "l"', "line 4, key_file: it stands there twice, as key_file and on line 3"),
        ("= nothing", "line 2: expected TOML"),
        ("region = ", 'line 2, region: expected TOML, such as name = "one": Invalid value'),
        ("region = here", "line 2, region: expected TOML"),
        ('name = "again"', 'line 2, name: expected TOML, such as name = "one": Cannot overwrite a value'),
        ('\njoin = ["127.0.0.1:1",\n', "line 3, join: expected TOML"),
    ],
)
def test_a_mistake_in_a_file_is_told_with_key_and_line(started: list[NodeConfig], tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text(WRITTEN + text)
    result = mesh_command("up", "--config", str(file), COLUMNS="500")
    assert (result.exit_code, started) == (2, [])
    assert told in " ".join(result.stderr.replace("│", " ").split()) and str(file) in result.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('bind = "here"', "line 2: --bind: expected HOST:PORT"),
        ("http = 8000", "line 2: --http: expected HOST:PORT"),
        ('spill-memory = "lots"', "line 2: --spill-memory: expected a size"),
        ('\njoin = ["127.0.0.1:1", "nowhere"]', "line 3: --join: expected HOST:PORT"),
        ('layers = "4:2"', "line 2: --layers '4:2': expected auto, none"),
        ('key-file = "/no/such/file"', "line 2: --key-file: expected a file"),
        ('dtype = "float64"', "line 2: --dtype: expected auto"),
        ("memory = 5", "line 2: --memory: expected at least 16MiB"),
    ],
)
def test_a_value_that_no_option_takes_is_told_with_its_line(
    started: list[NodeConfig], tmp_path: Path, text: str, told: str
) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text(WRITTEN + text)
    result = mesh_command("up", "--config", str(file))
    assert (result.exit_code, started) == (1, [])
    assert told in result.stderr and str(file) in result.stderr and len(result.stderr.splitlines()) == 1


def test_what_was_typed_wrongly_is_not_blamed_on_the_file(started: list[NodeConfig], tmp_path: Path) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text(WRITTEN + 'bind = "127.0.0.1:1"')
    result = mesh_command("up", "--config", str(file), "--bind", "here")
    assert result.exit_code == 1 and "--bind: expected HOST:PORT" in result.stderr and "line" not in result.stderr


def test_a_file_that_is_no_text_or_not_there_is_told_so(started: list[NodeConfig], tmp_path: Path) -> None:
    file = tmp_path / "mesh.toml"
    file.write_bytes(b"name = \xff\xfe")
    assert "not UTF-8 text" in mesh_command("up", "--config", str(file), COLUMNS="500").stderr
    assert "No such file" in mesh_command("up", "--config", str(tmp_path / "other"), COLUMNS="500").stderr
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
