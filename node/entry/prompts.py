"""From a request to the tokens that an engine sees: retrieval, chat template, limits, seed."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from random import SystemRandom

import msgspec
import trio

from mesh.errors import BadRequest
from mesh.ids import ModelId
from node.requests import Citation, GenerateRequest, Grammar, RetrievalReport, SamplingParams
from node.serving.models import ServedModel
from node.text.detokenize import Decode
from node.text.grammar import GrammarCheck
from node.text.sampling_defaults import settled
from node.text.tool_styles import conversation, grammar_for, knows_tools, style_of
from rag.context import build, citations
from rag.service import Documents
from rag.types import SearchResult

COMPILE_TIMEOUT_S = 5.0  # for a grammar, with the wait for other grammars; its own limits end a compilation within a second
MAX_SHRINKING = 4  # bound on input characters per character of a token: normalisers drop some
CONTEXT_SHARE = 0.6  # share of the model's context that passages may fill; the rest is for the question and the answer

FindModel = Callable[[ModelId | None], Awaitable[ServedModel]]  # as `PeerModels.get`


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request's prompt in tokens, with the model and the sampling that it is computed with."""

    model: ServedModel
    tokens: tuple[int, ...]
    sampling: SamplingParams  # max_tokens, seed and end tokens settled
    seed: int
    requested_name: ModelId | None = None  # the name by which the request asked for the model; None: the model's id
    retrieved: SearchResult | None = None
    tool_style: str = ""  # how the model writes tool calls, where the request offers tools
    markers: frozenset[int] = frozenset()  # special tokens that are kept in the text, as they delimit tool calls

    @property
    def name(self) -> ModelId:
        """The model's name in the answer."""
        return self.requested_name or self.model.card.id

    @property
    def decode(self) -> Decode:
        return self.model.text.decode_with(self.markers) if self.markers else self.model.text.decode

    def choice_sampling(self, choice: int) -> SamplingParams:
        """The sampling parameters of a choice: choice 0 has the request's seed, the others have seeds derived from it."""
        if choice == 0:
            return self.sampling
        digest = hashlib.blake2b(f"{self.seed}:{choice}".encode(), digest_size=8).digest()
        return msgspec.structs.replace(self.sampling, seed=int.from_bytes(digest, "big") >> 1)

    def stage_sampling(self, choice: int, *, last: bool) -> SamplingParams:
        """`choice_sampling` for a stage: without the grammar unless it is the last stage, which alone draws tokens."""
        sampling = self.choice_sampling(choice)
        return sampling if last or sampling.grammar is None else msgspec.structs.replace(sampling, grammar=None)

    def retrieval_report(self, texts: Sequence[str]) -> RetrievalReport | None:
        """The passages that the answer's texts cite; all that the prompt contained, where they cite none."""
        if self.retrieved is None:
            return None
        result = self.retrieved
        cited = {c.number: c for text in texts for c in citations(text, result.passages)}
        if not cited:
            numbers = " ".join(f"[{number}]" for number in range(1, len(result.passages) + 1))
            cited = {c.number: c for c in citations(numbers, result.passages)}
        return RetrievalReport(
            result.store,
            result.digest,
            result.shards_ok,
            result.shards_total,
            tuple(Citation(c.number, c.file_id, c.filename, c.quote, c.start, c.end) for _, c in sorted(cited.items())),
        )


class Prompts:
    def __init__(self, find_model: FindModel, documents: Documents, *, models_defaults: bool = True) -> None:
        """`models_defaults`: sampling fields that a request leaves unset are taken from the model's generation config."""
        self._find_model = find_model
        self._models_defaults = models_defaults
        self._documents = documents
        self._grammars = GrammarCheck()
        self._compiling = trio.CapacityLimiter(1)  # so that a burst of large grammars does not occupy every core

    async def prepare(self, request: GenerateRequest) -> Prompt:
        """Turns a request into its prompt.

        Raises:
            BadRequest: unknown model or store, a prompt that does not fit, tokens out of range, a grammar that does not compile.
            NoPath, ModelLoading, Refused: as `PeerModels.get`.
        """
        model = await self._find_model(request.model)
        retrieved = None
        if request.retrieval is not None and request.messages is not None:
            request, retrieved = await self._with_passages(request, model)
        _check_length(request, model)
        tokens = await trio.to_thread.run_sync(encode, request, model)
        if not tokens:
            raise BadRequest("the prompt is empty: at least one token is needed", _prompt_field(request))
        room = model.card.max_model_len - len(tokens)
        if room < 1 or (request.max_tokens or 0) > room:
            raise BadRequest(
                f"the context of {model.card.id} is {model.card.max_model_len} tokens; the prompt has {len(tokens)}"
                + (f" and max_tokens asks for {request.max_tokens} more" if request.max_tokens else "")
                + "; shorten the prompt"
                + (" or lower max_tokens" if request.max_tokens else ""),
                _prompt_field(request),
                "context_length_exceeded",
            )
        _check_vocabulary(tokens, model, request)
        grammar, style, markers = _tool_form(request, model)
        if grammar is not None:
            await self._check_grammar(grammar)
        # Drawn here, before the first attempt, so that every attempt draws with the same noise. 53 bits are exact in JSON.
        seed = request.seed if request.seed is not None else SystemRandom().getrandbits(53)
        ends = () if request.sampling.ignore_eos else model.text.end_tokens
        defaults = model.text.sampling_defaults if self._models_defaults else {}
        sampling = msgspec.structs.replace(
            settled(request.sampling, request.unset, defaults),
            seed=seed,
            max_tokens=request.max_tokens or room,
            stop_token_ids=tuple(sorted({*request.sampling.stop_token_ids, *ends})),
            grammar=grammar,
        )
        assert 1 <= sampling.max_tokens <= room
        return Prompt(model, tokens, sampling, seed, request.model, retrieved, style, markers)

    async def _check_grammar(self, grammar: Grammar) -> None:
        """Raises BadRequest if the grammar does not compile, or not in time."""
        if self._grammars.has(grammar):
            return
        with trio.move_on_after(COMPILE_TIMEOUT_S):
            await trio.to_thread.run_sync(self._grammars.check, grammar, limiter=self._compiling, abandon_on_cancel=True)
            return
        raise BadRequest(f"{grammar.param}: took more than {COMPILE_TIMEOUT_S:g} s to compile; make it simpler", grammar.param)

    async def _with_passages(self, request: GenerateRequest, model: ServedModel) -> tuple[GenerateRequest, SearchResult]:
        """Puts the passages that a search for the last user message finds in front of that message."""
        assert request.retrieval is not None and request.messages is not None
        messages = [dict(message) for message in request.messages]
        last = next((m for m in reversed(messages) if m.get("role") == "user"), None)
        if last is None:
            raise BadRequest("retrieval needs a user message to search for", "messages")
        question = str(last["content"])
        result = await self._documents.search(request.retrieval.store, question, request.retrieval.top_k)
        budget_tokens = int(CONTEXT_SHARE * (model.card.max_model_len - (request.max_tokens or 0)))
        context = await trio.to_thread.run_sync(
            build, question, result.passages, budget_tokens, lambda text: len(model.text.encode(text))
        )
        last["content"] = context.prompt
        return replace(request, messages=tuple(messages)), replace(result, passages=context.passages)


def _check_length(request: GenerateRequest, model: ServedModel) -> None:
    """Raises BadRequest, before it is tokenized, for a prompt that cannot fit: tokenizing megabytes takes a minute of a core."""
    texts = [message.get("content") for message in request.messages or ()] if request.prompt is None else [request.prompt]
    characters = sum(len(text) for text in texts if isinstance(text, str))
    if characters > MAX_SHRINKING * model.text.longest_token * model.card.max_model_len:
        raise BadRequest(
            f"the context of {model.card.id} is {model.card.max_model_len} tokens; "
            f"a prompt of {characters} characters is far beyond it; shorten the prompt",
            _prompt_field(request),
            "context_length_exceeded",
        )


def encode(request: GenerateRequest, model: ServedModel) -> tuple[int, ...]:
    """Encodes the request's prompt as tokens (*blocking*, milliseconds for a long prompt)."""
    if request.prompt_ids is not None:
        return request.prompt_ids
    if request.messages is not None:
        use, template = request.tools, model.text.template
        offered = use.tools if use is not None and use.choice != "none" else None
        messages = conversation(request.messages, use, template)
        return model.text.encode_chat(messages, offered if knows_tools(template) else None)
    return model.text.encode(request.prompt or "")


def _tool_form(request: GenerateRequest, model: ServedModel) -> tuple[Grammar | None, str, frozenset[int]]:
    """Returns the answer's grammar, how the model writes tool calls, and the special tokens that delimit them."""
    use, grammar = request.tools, request.sampling.grammar
    if use is None or use.choice == "none":
        return grammar, "", frozenset()
    style = style_of(model.text.template)
    markers = (model.text.special_id(marker) for marker in (style.opening, style.closing))
    kept_markers = frozenset(marker for marker in markers if marker is not None)
    return grammar_for(use, style, model.text.special_id, grammar), style.name, kept_markers


def _prompt_field(request: GenerateRequest) -> str:
    return "messages" if request.messages is not None else "prompt"


def _check_vocabulary(tokens: tuple[int, ...], model: ServedModel, request: GenerateRequest) -> None:
    """Raises BadRequest for a token id that the model does not have."""
    bad: object = next((token for token in tokens if not 0 <= token < model.text.vocab_size), None)
    if bad is not None:
        raise BadRequest(
            f"token {bad} is not in the vocabulary of {model.card.id} (0 to {model.text.vocab_size - 1})", _prompt_field(request)
        )
    for token in request.sampling.logit_bias:
        if not 0 <= token < model.text.vocab_size:
            raise BadRequest(f"token {token} is not in the vocabulary of {model.card.id}", "logit_bias")
