"""Transformers' OpenAI-compatible server around one VideoLLaMA3.

A model, its processor and what clients may do enter, the web application leaves. Its routes, streaming and
generation are those of `transformers serve`; this module hands it parts that know this model, and replaces nothing
inside transformers.

The server picks a model's class and its modality by names in tables of its own release, where a plugin is none. Its
parts take each other as arguments, though: `ServedModel` stands where transformers' loader would, so that no table is
asked; `ServedProcessor` stands where the model's processor would, and is the one door through which every message
comes, whatever the route; the handlers keep messages as they came (transformers drops parts and options that it does
not know, and asks for 32 frames of every video).
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import inspect
import json
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import transformers
from fastapi import HTTPException
from fastapi.responses import JSONResponse
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState, Modality

from .media_access import MediaAccess
from .openai_messages import VIDEO_OPTIONS, read_messages

# What a client may say in `chat_template_kwargs`, for the whole request.
REQUEST_OPTIONS = (*VIDEO_OPTIONS, "use_token_compression", "add_system_prompt")
# Requests whose media are fetched and decoded at the same time; generation is one at a time, as in transformers.
_PREPARING_THREADS = 4

# Methods of transformers that are overridden here: where one is gone, ours would never be called.
_OVERRIDDEN = {
    ModelManager: (
        "process_model_name",
        "load_model_and_processor",
        "load_model_streaming",
        "get_model_modality",
        "get_gen_models",
        "shutdown",
    ),
    ChatCompletionHandler: ("handle_request", "get_processor_inputs_from_messages"),
    ResponseHandler: ("handle_request", "get_processor_inputs_from_messages"),
}

_prepared: ContextVar[Any] = ContextVar("prepared inputs of the request", default=None)


def build_application(
    model: Any, processor: Any, *, name: str, access: MediaAccess, add_system_prompt: bool = True
) -> Any:
    """Builds the server's application.

    Args:
        model: a `VideoLlama3ForCausalLM`, on its device.
        processor: its `VideoLlama3Processor`.
        name: what clients call the model.
        access: which media clients may name.
        add_system_prompt: put the released models' system prompt before conversations without one.

    Returns:
        An ASGI application.

    Raises:
        RuntimeError: when the installed transformers has a server of another shape.
    """
    _check_overridden()
    served = ServedModel(name, model, ServedProcessor(model, processor, access, add_system_prompt=add_system_prompt))
    state = GenerationState()
    threads = ThreadPoolExecutor(_PREPARING_THREADS, thread_name_prefix="prepare")
    parts = {
        "model_manager": served,
        "generation_state": state,
        "chat_handler": _ChatHandler(served, state, threads),
        "response_handler": _ResponsesHandler(served, state, threads),
        "completion_handler": CompletionHandler(served, state),
    }
    application = build_server(**_arguments_of_build_server(parts))
    application.add_exception_handler(HTTPException, _error_for_openai)
    return _ends_quietly(application)


def _check_overridden() -> None:
    for owner, names in _OVERRIDDEN.items():
        gone = [name for name in names if not callable(getattr(owner, name, None))]
        if gone:
            raise _another_shape(f"no {', '.join(gone)} in {owner.__name__}")


def _arguments_of_build_server(parts: dict[str, Any]) -> dict[str, Any]:
    """What this release's `build_server` asks for; routes that are none of this model's are refused."""
    parameters = inspect.signature(build_server).parameters
    gone = sorted(set(parts) - set(parameters))
    if gone:
        raise _another_shape(f"build_server does not take {', '.join(gone)}")
    arguments = dict(parts)
    for name, parameter in parameters.items():
        if name in parts:
            continue
        # Releases add routes (decisions, transcription), each with a handler of its own.
        if name.endswith("_handler"):
            arguments[name] = _RefusedRoute()
        elif parameter.default is parameter.empty:
            raise _another_shape(f"build_server asks for {name}")
    return arguments


def _another_shape(difference: str) -> RuntimeError:
    return RuntimeError(
        f"Expected the server of transformers 5.16.1 to 5.23, got that of {transformers.__version__}: {difference}. "
        "Install one of these versions."
    )


class ServedModel(ModelManager):
    """The one model of this server, under one name; transformers' own loads whatever a client names.

    Args:
        name: what clients call it.
        model: on its device.
        processor: a `ServedProcessor`.
    """

    def __init__(self, name: str, model: Any, processor: ServedProcessor) -> None:
        super().__init__()
        # Requests for other models are refused by transformers itself.
        self.force_model = name
        self.model, self.processor = model, processor
        self._created = int(time.time())

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """The name as it is: a folder has no revision."""
        return model_id

    def load_model_and_processor(self, model_id_and_revision: str, **_: Any) -> tuple[Any, ServedProcessor]:
        """The model and its processor."""
        self._check(model_id_and_revision)
        return self.model, self.processor

    def load_model_streaming(self, model_id_and_revision: str, **_: Any) -> AsyncIterator[str]:
        """Tells `transformers chat` that the model is there."""
        self._check(model_id_and_revision)
        return _ready(model_id_and_revision)

    @staticmethod
    def get_model_modality(model: Any, processor: Any = None) -> Modality:
        """Images, videos and text in, text out."""
        return Modality.VLM

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """This model, and not what lies in the Hub's cache."""
        return [{"id": self.force_model, "object": "model", "created": self._created, "owned_by": "videollama3"}]

    def shutdown(self) -> None:
        """Keeps the model: `/reset` would leave a server without one."""

    def _check(self, name: str) -> None:
        if name != self.force_model:
            raise HTTPException(400, f"Expected the model {self.force_model!r} of this server, got {name!r:.200}.")


async def _ready(name: str) -> AsyncIterator[str]:
    yield f"data: {json.dumps({'status': 'ready', 'model': name, 'cached': True})}\n\n"


class _InputsWanted(Exception):
    """A handler has reached the point where it wants the inputs of the model."""

    def __init__(self, messages: Any, options: dict[str, Any]) -> None:
        super().__init__()
        self.messages = messages
        self.options = options


class ServedProcessor:
    """What the handlers need of a processor, and the door through which media come.

    Args:
        model: tells how long a prompt may be.
        processor: reads conversations; for this class alone.
        access: which media clients may name.
        add_system_prompt: for conversations without a system message.
    """

    def __init__(self, model: Any, processor: Any, access: MediaAccess, *, add_system_prompt: bool) -> None:
        # The processor encodes in several threads, and tokenizers keep settings of the last call.
        self.tokenizer = copy.deepcopy(processor.tokenizer)
        self._processor = processor
        self._access = access
        self._add_system_prompt = add_system_prompt
        self._max_length = model.config.text_config.max_position_embeddings
        # Once before there are threads: what is set up by the first call is ready then.
        self.encode([{"role": "user", "content": "a"}], {})

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        """The inputs that were prepared for this request; asks for them where there are none yet.

        What transformers decides for all models (32 frames of a video) is left out, since this processor has the
        rule that the weights were trained with; what the client says reaches `encode`.
        """
        prepared = _prepared.get()
        if prepared is None:
            raise _InputsWanted(messages, options)
        return prepared

    def read(self, messages: Any) -> list[dict[str, Any]]:
        """The conversation of a request, its media admitted but not opened; see `openai_messages.read_messages`."""
        return read_messages(messages, self._access)

    def encode(self, messages: Any, options: dict[str, Any]) -> Any:
        """Reads the messages of a request and their media.

        Args:
            messages: as the client wrote them.
            options: of `apply_chat_template`; those not among `REQUEST_OPTIONS` have no effect.

        Returns:
            Everything that the model takes, one row.

        Raises:
            TypeError: see `openai_messages.read_messages`.
            ValueError: for media that cannot be read, and prompts that are too long for the model.
        """
        if options.get("tools"):
            raise ValueError("Expected a request without tools: VideoLLaMA3 knows none.")
        chosen = {name: options[name] for name in REQUEST_OPTIONS if options.get(name) is not None}
        features = self._processor.apply_chat_template(
            self.read(messages),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **{"add_system_prompt": self._add_system_prompt, **chosen},
        )
        length = features["input_ids"].shape[-1]
        if length >= self._max_length:
            raise ValueError(
                f"Expected a prompt of fewer than {self._max_length} tokens, got {length}: lower max_frames or "
                "max_visual_tokens."
            )
        return features

    # The server gives `generate` a model's processor where it wants a tokenizer (for stop strings), and decodes with
    # it: what is not said above is the tokenizer's.
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Token ids of texts."""
        return self.tokenizer(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        if name == "tokenizer":
            raise AttributeError(name)
        return getattr(self.tokenizer, name)


class _PreparesAside:
    """Fetches and decodes the media of a request in a thread, so that other requests' answers go on meanwhile.

    Transformers' handlers prepare a request in the middle of `handle_request`, on the one thread that also sends
    all answers. So a request is handled twice: until it asks for its inputs, which changes nothing, and, once they
    are there, to its end.
    """

    field: str

    def __init__(self, served: ServedModel, state: GenerationState, threads: ThreadPoolExecutor) -> None:
        super().__init__(served, state)  # type: ignore[call-arg] # of BaseHandler, which comes next
        self._door = served.processor
        self._threads = threads

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Answers one request."""
        _check_body(body, self.field)
        handle = super().handle_request  # type: ignore[misc] # of the handler, which comes next
        try:
            return await handle(body, request_id)
        except _InputsWanted as wanted:
            prepared = await self._prepare(wanted)
        token = _prepared.set(prepared)
        try:
            return await handle(body, request_id)
        finally:
            _prepared.reset(token)

    async def _prepare(self, wanted: _InputsWanted) -> Any:
        loop = asyncio.get_running_loop()
        with _answered_as_bad_request():
            return await loop.run_in_executor(self._threads, self._door.encode, wanted.messages, wanted.options)

    def get_processor_inputs_from_messages(self, messages: Any, modality: Any) -> Any:
        """The messages as they came, after a look at them: reading them is `ServedProcessor`'s."""
        with _answered_as_bad_request():
            self._door.read(messages)
        return messages


class _ChatHandler(_PreparesAside, ChatCompletionHandler):
    field = "messages"


class _ResponsesHandler(_PreparesAside, ResponseHandler):
    field = "input"


def _check_body(body: dict[str, Any], field: str) -> None:
    if field not in body:
        raise HTTPException(400, f"Expected a request with `{field}`, got {', '.join(sorted(body)) or 'nothing'}.")
    options = body.get("chat_template_kwargs", {})
    known = ", ".join(REQUEST_OPTIONS)
    if not isinstance(options, dict):
        raise HTTPException(400, f"Expected `chat_template_kwargs` as an object of {known}; got {options!r:.80}.")
    unknown = sorted(set(options) - set(REQUEST_OPTIONS))
    if unknown:
        raise HTTPException(400, f"Expected `chat_template_kwargs` among {known}; got {', '.join(unknown)}.")


@contextlib.contextmanager
def _answered_as_bad_request() -> Iterator[None]:
    """What readers of messages and media raise is the client's affair."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise HTTPException(400, str(error)) from error


async def _error_for_openai(_: Any, error: Any) -> JSONResponse:
    return _error_response(error.status_code, error.detail)


def _error_response(status: int, message: str) -> JSONResponse:
    """An error where OpenAI's clients look for its text; they show no other."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status_code=status)


def _ends_quietly(application: Any) -> Any:
    """The application; an answer that is broken off since the server ends is no failure of it.

    Uvicorn cancels what is still under way then, and would log each as an error with its traceback.
    """

    async def ending(scope: Any, receive: Any, send: Any) -> None:
        started = False

        async def noting(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await application(scope, receive, noting)
        except asyncio.CancelledError:
            if not started:
                await _error_response(503, "The server ends.")(scope, receive, send)

    return ending


class _RefusedRoute:
    """Stands where transformers has a handler for something that this model does not do."""

    async def handle_request(self, *_: Any) -> Any:
        """Answers that there is no such thing."""
        raise HTTPException(
            404, "VideoLLaMA3 is served under /v1/chat/completions, /v1/responses and /v1/completions only."
        )
