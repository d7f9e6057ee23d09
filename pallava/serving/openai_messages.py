"""Parses OpenAI chat completion requests to conversations; unsupported options are rejected.

The format is OpenAI's (platform.openai.com/docs/api-reference/chat/create).
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from pallava.inference.streaming import Sampling
from pallava.slide_bags import SlideBag
from pallava.text.turns import Role, Turn, check_turns, marked_text
from pathcore.images import ImageError, decode_image

MAX_PIXELS = 100_000_000
"""Maximum number of pixels of all images in a request: 10,000 x 10,000 take 300 MB as RGB."""
MAX_IMAGES = 16
MAX_ANSWERS = 8
MAX_STOPS = 4
DEFAULT_MAX_TOKENS = 1200

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}

ReadSlide = Callable[[str], SlideBag]

_SLIDE = "slide:"

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "store": (False,),
    "modalities": (["text"],),
}
"""Unsupported options, with the neutral values that are accepted."""
_IGNORED = ("user", "safety_identifier", "parallel_tool_calls")  # have no effect on answers
_SUPPORTED = (
    *("model", "messages", "max_tokens", "max_completion_tokens", "n", "stop", "seed"),
    *("temperature", "top_p", "stream", "stream_options"),
)


class RequestError(ValueError):
    """Raised for a rejected request; carries the fields of OpenAI's error objects.

    Attributes:
        param: Name of the offending field.
        code: OpenAI's error code.
        status: HTTP status.
    """

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


@dataclass(frozen=True)
class ChatRequest:
    """A parsed request."""

    turns: tuple[Turn, ...]
    sampling: Sampling
    num_answers: int
    stream: bool
    include_usage: bool


def read_request(
    body: Any, model: str, max_pixels: int = MAX_PIXELS, read_slide: ReadSlide | None = None
) -> ChatRequest:
    """Parses the JSON of a request and decodes its images.

    Args:
        body: Parsed JSON.
        model: Name of the served model.
        max_pixels: Maximum number of pixels of all images together.
        read_slide: For a model of slides, function that returns the tiles of a slide by its name,
            which messages give as `slide:NAME` in place of the URL of an image.

    Raises:
        RequestError: If the request is invalid or uses an unsupported option.
    """
    if not isinstance(body, dict):
        raise RequestError("expected a JSON object")
    fields = {name: value for name, value in body.items() if value is not None}
    _refuse_unsupported(fields)
    if fields.get("model") != model:
        raise RequestError(
            f"model {fields.get('model')!r:.80}: this server has {model!r}",
            "model",
            "model_not_found",
            404,
        )
    stream = _typed(fields, "stream", bool, False)
    options = _typed(fields, "stream_options", dict, {})
    if unknown := set(options) - {"include_usage", "include_obfuscation"}:
        raise _unsupported(f"stream_options.{min(unknown)}")
    if options and not stream:
        raise RequestError("stream_options: only with stream", "stream_options")
    num_answers = _typed(fields, "n", int, 1)
    if not 1 <= num_answers <= MAX_ANSWERS:
        raise RequestError(f"n: expected 1 to {MAX_ANSWERS}, found {num_answers}", "n")
    sampling = _sampling(fields)
    turns = _read_turns(fields.get("messages"), max_pixels, read_slide)
    return ChatRequest(
        turns, sampling, num_answers, stream, _typed(options, "include_usage", bool, False)
    )


def _refuse_unsupported(fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if name in _NEUTRAL:
            if not any(value == neutral for neutral in _NEUTRAL[name]):
                raise _unsupported(name)
        elif name not in _SUPPORTED and name not in _IGNORED:
            raise _unsupported(name)


def _unsupported(name: str) -> RequestError:
    return RequestError(
        f"{name!s:.80}: not supported by this server; leave it out",
        name,
        "unsupported_parameter",
    )


def _typed(fields: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = fields.get(name, default)
    fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise RequestError(f"{name}: expected {kind.__name__}, found {value!r:.80}", name)
    return value


def _sampling(fields: Mapping[str, Any]) -> Sampling:
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in fields]
    lengths = {_typed(fields, name, int, None) for name in names}
    if len(lengths) > 1:
        raise RequestError("max_tokens and max_completion_tokens differ; give one", names[0])
    stop = fields.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stop, list)
        or len(stop) > MAX_STOPS
        or not all(isinstance(word, str) for word in stop)
    ):
        raise RequestError(f"stop: expected a text or up to {MAX_STOPS} of them", "stop")
    try:
        return Sampling(
            max_new_tokens=lengths.pop() if lengths else DEFAULT_MAX_TOKENS,
            temperature=_typed(fields, "temperature", float, 0.0),
            top_p=_typed(fields, "top_p", float, 1.0),
            seed=_typed(fields, "seed", int, 0) if "seed" in fields else None,
            stop=tuple(stop),
        )
    except RequestError:
        raise
    except ValueError as error:
        name = str(error).split(":")[0]
        param = names[0] if name == "max_new_tokens" and names else name
        raise RequestError(str(error).replace("max_new_tokens", param), param) from error


def _read_turns(messages: Any, max_pixels: int, read_slide: ReadSlide | None) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages: expected a list of messages", "messages")
    turns: list[Turn] = []
    pixels_left = max_pixels
    for index, message in enumerate(messages):
        param = f"messages[{index}]"
        if not isinstance(message, dict):
            raise RequestError(f"{param}: expected an object", param)
        role = _ROLES.get(str(message.get("role")))
        if role is None:
            raise RequestError(
                f"{param}.role: expected {', '.join(_ROLES)}, found {message.get('role')!r:.80}",
                param,
            )
        others = [name for name, value in message.items() if value not in (None, [])]
        if unknown := set(others) - {"role", "content", "name"}:
            raise _unsupported(f"{param}.{min(unknown)}")
        text, urls = _content(message.get("content"), param)
        if len(urls) + sum(len(turn.images) for turn in turns) > MAX_IMAGES:
            raise RequestError(f"{param}: more than {MAX_IMAGES} images in a request", param)
        images: list[Any] = []
        for url in urls:
            if read_slide is not None:
                images.append(_slide(url, param, read_slide))
                continue
            images.append(_image(url, param, pixels_left))
            pixels_left -= images[-1].width * images[-1].height
        turns.append(Turn(role, text, tuple(images)))
        try:
            marked_text(turns[-1])
        except ValueError as error:
            raise RequestError(f"{param}.content: {error}", param) from error
    try:
        check_turns(turns)
    except ValueError as error:
        raise RequestError(f"messages: {error}", "messages") from error
    return tuple(turns)


def _content(content: Any, param: str) -> tuple[str, list[str]]:
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise RequestError(f"{param}.content: expected a text or a list of parts", param)
    texts, urls = [], []
    for index, part in enumerate(content):
        where = f"{param}.content[{index}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url" and isinstance(part.get("image_url"), dict):
            image = part["image_url"]
            if image.get("detail") not in (None, "auto"):
                raise _unsupported(f"{where}.image_url.detail")
            if not isinstance(image.get("url"), str):
                raise RequestError(f"{where}.image_url.url: expected a text", where)
            urls.append(image["url"])
        else:
            raise RequestError(
                f"{where}: expected a part of type text or image_url, found {kind!r:.80}", where
            )
    return "\n".join(texts), urls


def _slide(url: str, param: str, read_slide: ReadSlide) -> SlideBag:
    if not url.startswith(_SLIDE):
        raise RequestError(
            f"{param}: this model reads slides; expected {_SLIDE}NAME with a name of this server's "
            f"listing, got {url!r:.40}",
            param,
            "invalid_image_url",
        )
    try:
        return read_slide(url.removeprefix(_SLIDE))
    except (ValueError, FileNotFoundError) as error:
        raise RequestError(f"{param}: {error}", param, "invalid_image") from error


def _image(url: str, param: str, max_pixels: int) -> Image.Image:
    head, comma, payload = url.partition(",")
    if not head.lower().startswith("data:") or not comma:
        raise RequestError(
            f"{param}: image_url takes data: URLs only "
            "(data:image/png;base64,...). This server fetches nothing, neither from the network "
            f"nor from its disk; got {url!r:.40}",
            param,
            "invalid_image_url",
        )
    if not head.lower().endswith(";base64"):
        raise RequestError(f"{param}: expected a data: URL in base64", param, "invalid_image_url")
    try:
        data = base64.b64decode(payload, validate=True)
        return decode_image(data, name=f"image of {param}", max_pixels=max(0, max_pixels))
    except ImageError as error:
        raise RequestError(str(error), param, "invalid_image") from error
    except ValueError as error:  # more than binascii.Error, for letters outside ASCII
        raise RequestError(f"{param}: no valid base64: {error}", param, "invalid_image") from error
