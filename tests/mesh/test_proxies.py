"""Proxies of the environment are not used: nodes are on this machine or in a private network."""

from __future__ import annotations

import openai
import pytest
from typer.testing import CliRunner

from cli.main import app
from mesh import AsyncClient, Client
from mesh.errors import LocalError
from tests.cli.fake_mesh import FakeMesh, fake_mesh, texts

UNUSED = "127.0.0.1:9"  # the discard port: no proxy listens there
ENVIRONMENTS = [
    {"http_proxy": f"http://{UNUSED}"},
    {"HTTP_PROXY": f"http://{UNUSED}", "HTTPS_PROXY": f"http://{UNUSED}"},
    {"ALL_PROXY": f"socks5://{UNUSED}"},
    {"all_proxy": f"socks5h://{UNUSED}", "no_proxy": ""},
]


@pytest.fixture(params=ENVIRONMENTS, ids=lambda environment: "+".join(environment))
def proxied(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in request.param.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("proxied")
def test_the_client_and_its_official_client_reach_a_node_directly() -> None:
    with fake_mesh(1) as mesh, Client([mesh.url(0)]) as client:
        assert client.chat("hello")["id"] == "chatcmpl-w"
        with client.openai() as official:
            assert [model.id for model in official.models.list()] == ["tiny"]
            chunks = official.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == texts(12)


@pytest.mark.usefixtures("proxied")
async def test_the_trio_client_and_its_official_client_reach_a_node_directly() -> None:
    with fake_mesh(1) as mesh:
        async with AsyncClient([mesh.url(0)]) as client:
            assert (await client.chat("hello"))["id"] == "chatcmpl-w"
            async with await client.openai() as official:
                assert isinstance(official, openai.AsyncOpenAI)
                assert [model.id async for model in official.models.list()] == ["tiny"]


@pytest.mark.usefixtures("proxied")
@pytest.mark.parametrize("command", ["status", "models", "chat hello", "load --users 2 --requests 4 --max-tokens 12"])
def test_the_commands_reach_a_node_directly(command: str) -> None:
    with fake_mesh(1) as mesh:
        result = CliRunner().invoke(app, [*command.split(), "--node", mesh.url(0)])
    assert result.exit_code == 0, result.output


def through(mesh: FakeMesh) -> list[str]:
    """Returns the requests that were sent to it as to a proxy: with the whole URL."""
    return [request.path for request in mesh.seen if request.path.startswith("http://")]


def test_a_proxy_that_is_asked_for_is_used() -> None:
    with fake_mesh(1) as proxy, Client(["http://127.0.0.1:1"], proxy=proxy.url(0)) as client:
        client.chat("hello")
        with client.openai() as official:
            official.models.list()
    assert "http://127.0.0.1:1/v1/chat/completions" in through(proxy) and "http://127.0.0.1:1/v1/models" in through(proxy)


def test_options_of_the_official_client_are_passed_on() -> None:
    with fake_mesh(1) as mesh, Client([mesh.url(0)], "mk-1") as client:
        with client.openai(max_retries=7, timeout=3.0) as official:
            assert (official.max_retries, official.timeout, official.api_key) == (7, 3.0, "mk-1")
            assert str(official.base_url) == f"{mesh.url(0)}/v1/"
        requests: list[str] = []
        own = openai.DefaultHttpxClient(event_hooks={"request": [lambda request: requests.append(request.url.path)]})
        with client.openai(http_client=own) as official:
            official.models.list()
        assert requests == ["/v1/models"], "the caller's own HTTP client is used"


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_the_error_of_a_proxy_without_its_package_names_the_package(kind: type[Client]) -> None:
    with pytest.raises(LocalError, match=r"httpx\[socks\]"):
        kind(["http://127.0.0.1:1"], proxy=f"socks5://{UNUSED}")
