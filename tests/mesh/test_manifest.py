"""Manifests: what is the same model, what is refused before it is believed, which tensors a span is made of."""

from collections.abc import Iterable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.manifest import (
    DIGEST_BYTES,
    FORM,
    PIECE_BYTES,
    BadManifest,
    FileEntry,
    Manifest,
    TensorEntry,
    decode,
    digest_of,
    encode,
    identity,
    is_identity,
    is_text_file,
    layer_of,
    pieces_of,
    tensors_of_span,
)

GOLDEN = "c630628e1a89a19d47089526ace78d3dbee4e94a5a388e20c1157ce3d67c81ef"


def tensor(name: str, *shape: int, dtype: str = "F32") -> TensorEntry:
    bare = TensorEntry(name, dtype, shape, b"")
    return TensorEntry(name, dtype, shape, bytes(DIGEST_BYTES * -(-bare.size_bytes // PIECE_BYTES)))


def manifest(*tensors: TensorEntry, files: Iterable[FileEntry] = ()) -> Manifest:
    return Manifest(FORM, tuple(files), tuple(sorted(tensors, key=lambda each: each.name)))


def test_a_manifest_comes_back_only_under_its_own_identity() -> None:
    encoded = encode(manifest(tensor("a", 3, 5)))
    assert decode(encoded, identity(encoded)) == manifest(tensor("a", 3, 5))
    assert is_identity(identity(encoded))
    with pytest.raises(BadManifest, match="not"):
        decode(encoded + b"\0", identity(encoded))
    with pytest.raises(BadManifest):
        decode(encoded, identity(encoded + b"\0"))


@pytest.mark.parametrize("text", [None, 7, "", "a" * 63, "A" * 64, "../" + "a" * 61])
def test_what_peers_call_an_identity_is_checked_before_it_names_a_folder(text: int | str | None) -> None:
    assert not is_identity(text)


@pytest.mark.parametrize(
    "bad",
    [
        manifest(files=[FileEntry("model.py", 0, b"")]),
        manifest(files=[FileEntry("../config.json", 0, b"")]),
        manifest(files=[FileEntry("config.json", (64 << 20) + 1, bytes(65 * DIGEST_BYTES))]),
        manifest(files=[FileEntry("config.json", 10, b"")]),
        manifest(files=[FileEntry("config.json", 0, b""), FileEntry("config.json", 0, b"")]),
        manifest(TensorEntry("x", "F32", (1,), b"")),
        manifest(TensorEntry("x", "PICKLE", (1,), bytes(DIGEST_BYTES))),
        manifest(TensorEntry("__metadata__", "F32", (), bytes(DIGEST_BYTES))),
        manifest(TensorEntry("new\nline", "F32", (), bytes(DIGEST_BYTES))),
        manifest(TensorEntry("x", "F32", (1 << 40, 1 << 40), b"")),
    ],
    ids=lambda bad: str(bad)[-60:],
)
def test_a_manifest_out_of_bounds_is_refused(bad: Manifest) -> None:
    encoded = encode(bad)
    with pytest.raises(BadManifest):
        decode(encoded, identity(encoded))


@given(st.binary(max_size=200))
def test_no_bytes_break_the_decoder(raw: bytes) -> None:
    with pytest.raises(BadManifest):
        decode(raw, identity(raw))


@given(st.integers(0, 3 * PIECE_BYTES + 1))
def test_pieces_cover_every_byte_once(size_bytes: int) -> None:
    file = FileEntry("vocab.txt", size_bytes, bytes(DIGEST_BYTES * -(-size_bytes // PIECE_BYTES)))
    pieces = list(pieces_of(file))
    assert sum(piece.size_bytes for piece in pieces) == size_bytes
    assert [piece.offset for piece in pieces] == [number * PIECE_BYTES for number in range(len(pieces))]


def test_a_piece_is_only_the_bytes_of_its_hash() -> None:
    piece = next(pieces_of(FileEntry("vocab.txt", 3, digest_of(b"abc"))))
    assert piece.matches(b"abc")
    assert not piece.matches(b"abd") and not piece.matches(b"abcd") and not piece.matches(b"")


def test_the_identity_of_a_model_is_the_same_in_every_release() -> None:
    """Otherwise a node could not recognise the weights of a node of an earlier release as equal to its own."""
    files = [FileEntry("config.json", 2, digest_of(b"{}"))]
    tensors = [TensorEntry("a", "BF16", (1, 2), digest_of(b"\0\1\2\3")), TensorEntry("b", "F32", (0, 3), b"")]
    assert identity(encode(manifest(*tensors, files=files))) == GOLDEN


def test_a_manifest_of_an_earlier_form_is_refused() -> None:
    earlier = msgspec.msgpack.encode(("weights", 4, 100, (), ()))
    for encoded in (earlier, msgspec.msgpack.encode((FORM + 1, (), ()))):
        with pytest.raises(BadManifest, match="not a manifest"):
            decode(encoded, identity(encoded))


@pytest.mark.parametrize(
    ("name", "is_read"),
    [
        ("config.json", True),
        ("config.4.40.0.json", True),
        ("tokenizer.4.0.json", True),
        ("additional_chat_templates/tool-use.jinja", True),
        ("additional_chat_templates/../x.jinja", False),
        ("additional_chat_templates/a/b.jinja", False),
        ("elsewhere/x.jinja", False),
        ("/config.json", False),
        ("config.py.json", False),
        ("modeling_llama.py", False),
        ("README.md", False),
        ("model.safetensors.index.json", False),
    ],
)
def test_what_a_loader_reads_beside_the_weights_is_known_by_name(name: str, is_read: bool) -> None:
    assert is_text_file(name) is is_read


NAMES = {
    "model.layers.11.mlp.experts.3.w1.weight": 11,
    "transformer.h.0.attn.c_attn.weight": 0,
    "gpt_neox.layers.2.mlp.bias": 2,
    "model.embed_tokens.weight": None,
    "lm_head.weight": None,
}


@pytest.mark.parametrize(("name", "layer"), NAMES.items())
def test_the_first_number_in_a_name_is_its_layer(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer


LLAMA = [
    tensor("lm_head.weight", 50, 8),
    tensor("model.embed_tokens.weight", 50, 8),
    *(tensor(f"model.layers.{number}.norm.weight", 8) for number in range(4)),
    tensor("model.norm.weight", 8),
]


def names(tensors: Iterable[TensorEntry]) -> set[str]:
    return {each.name for each in tensors}


def test_a_span_needs_its_layers_and_few_other_tensors() -> None:
    def of(start: int, end: int, tied: bool = False) -> set[str]:
        return names(tensors_of_span(LLAMA, 4, start, end, 50, tied=tied))

    layers = {number: f"model.layers.{number}.norm.weight" for number in range(4)}
    assert of(0, 2) == {layers[0], layers[1], "model.embed_tokens.weight", "model.norm.weight"}
    assert of(1, 3) == {layers[1], layers[2], "model.norm.weight"}
    assert of(2, 4) == {layers[2], layers[3], "lm_head.weight", "model.norm.weight"}
    assert of(2, 4, tied=True) == of(2, 4) | {"model.embed_tokens.weight"}
    assert of(0, 4) == names(LLAMA)


def test_without_a_head_of_its_own_the_embedding_is_the_head() -> None:
    headless = [each for each in LLAMA if each.name != "lm_head.weight"]
    assert "model.embed_tokens.weight" in names(tensors_of_span(headless, 4, 3, 4, 50, tied=False))
    assert "model.embed_tokens.weight" not in names(tensors_of_span(headless, 4, 1, 3, 50, tied=False))


def test_an_unknown_vocabulary_leaves_nothing_out() -> None:
    assert names(tensors_of_span(LLAMA, 4, 1, 2, None, tied=False)) >= {"lm_head.weight", "model.embed_tokens.weight"}
