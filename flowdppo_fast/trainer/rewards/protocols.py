"""What reward servers are asked and answer: one class for each protocol that is in use."""

from __future__ import annotations

import base64
import json
import pickle
import pickletools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from .images import encode, to_arrays
from .wire import Format, encode_request, excerpt, parse_json, parse_numbers, parse_rewards

Rewards = Tensor | dict[str, Tensor]


class WireProtocol(Protocol):
    """Requests as bytes, and rewards from the bytes of an answer."""

    content_type: str

    def encode(self, pixels: Tensor, prompts: Sequence[Any], metadata: Sequence[Mapping]) -> bytes:
        """The body of a request for ``[B, F, C, H, W]`` pixels in [0, 1]."""

    def parse(self, answer: bytes, count: int) -> Rewards:
        """Float32 ``[count]``, or several by name; NaN where the server abstained. Raises ValueError."""


class FlowDPPOProtocol:
    """Ours: ``docs/rewards.md`` has the schema."""

    content_type = "application/json"

    def __init__(self, format: Format = "png", quality: int = 95):
        self.format, self.quality = format, quality

    def encode(self, pixels: Tensor, prompts: Sequence[Any], metadata: Sequence[Mapping]) -> bytes:
        return encode_request(pixels, prompts, metadata, self.format, self.quality)

    def parse(self, answer: bytes, count: int) -> Rewards:
        return parse_rewards(answer, count)


class UniRLProtocol:
    """The JSON of UniRL's reward service: ``POST /score``, ``results[i][reward][metric]`` in the answer.

    A reward with one metric has its own name, one with several appears as ``reward.metric``. A failure of a reward that
    the service reports for an image is an error here.

    Args:
        rewards: names of what the service is to compute.
        quality: of the JPEG files that are sent; None sends PNG.
    """

    content_type = "application/json"

    def __init__(self, rewards: Sequence[str], quality: int | None = None):
        if isinstance(rewards, str) or not rewards or not all(isinstance(name, str) for name in rewards):
            raise ValueError(f"rewards: got {rewards!r}, expected a list of names that the service has")
        self.rewards, self.quality = list(rewards), quality

    def encode(self, pixels: Tensor, prompts: Sequence[Any], metadata: Sequence[Mapping]) -> bytes:
        requests = [
            {
                "history": [{"text": prompt, "image_b64": image}],
                "required_rewards": self.rewards,
                "metadata": dict(entry),
            }
            for prompt, image, entry in zip(prompts, images_base64(pixels, self.quality), metadata)
        ]
        return to_json({"requests": requests})

    def parse(self, answer: bytes, count: int) -> Rewards:
        content = parse_json(answer)
        results: Any = content.get("results") if isinstance(content, dict) else None
        errors: Any = content.get("errors") or [{}] * count if isinstance(content, dict) else None
        if not _lists_of_mappings(results, count) or not _lists_of_mappings(errors, count):
            raise ValueError(f'expected {{"results": [...], "errors": [...]}} with {count} each, got {excerpt(answer)}')
        failed = next(((place, entry) for place, entry in enumerate(errors) if entry), None)
        if failed is not None:
            name, problem = next(iter(failed[1].items()))
            raise ValueError(f"reward {name!r} failed for sample {failed[0]}: {excerpt(str(problem).encode())}")
        columns: dict[str, list[Any]] = {}
        for place, entry in enumerate(results):
            if set(entry) != set(self.rewards) or not all(isinstance(part, dict) and part for part in entry.values()):
                raise ValueError(f"got the rewards {sorted(entry)} for sample {place}, expected {sorted(self.rewards)}")
            flat = {
                name if len(metrics) == 1 else f"{name}.{metric}": value
                for name, metrics in entry.items()
                for metric, value in metrics.items()
            }
            if (columns and set(flat) != set(columns)) or (place and not columns):
                raise ValueError(f"got the metrics {sorted(flat)} for sample {place}, expected {sorted(columns)}")
            for name, value in flat.items():
                columns.setdefault(name, []).append(value)
        named = {name: parse_numbers(values, count, repr(name)) for name, values in columns.items()}
        return next(iter(named.values())) if len(named) == 1 else named


class FlowGRPOProtocol:
    """The pickles of flow_grpo's servers (GenEval, DeQA, UnifiedReward), written and read without running code.

    The request is a pickle of JPEG files, texts and numbers. The answer is read by :func:`read_pickle`, which knows
    plain values only: a server that pickles numpy arrays or objects of its own is refused.

    Args:
        answer: name of the list in the answer: ``"scores"`` (GenEval) or ``"outputs"`` (DeQA, UnifiedReward).
        quality: of the JPEG files; flow_grpo leaves Pillow's 75.
        extra: entries that the request has beside ``images``, ``prompts`` and ``meta_datas``.
    """

    content_type = "application/octet-stream"

    def __init__(self, answer: str = "scores", quality: int = 75, extra: Mapping[str, Any] | None = None):
        self.answer, self.quality, self.extra = answer, quality, dict(extra or {"only_strict": False})

    def encode(self, pixels: Tensor, prompts: Sequence[Any], metadata: Sequence[Mapping]) -> bytes:
        images = [base64.b64decode(text) for text in images_base64(pixels, self.quality)]
        # what JSON can hold is plain
        plain = json.loads(
            to_json({"prompts": list(prompts), "meta_datas": [dict(entry) for entry in metadata], **self.extra})
        )
        return pickle.dumps({"images": images, **plain}, protocol=4)

    def parse(self, answer: bytes, count: int) -> Rewards:
        content = read_pickle(answer)
        if not isinstance(content, dict) or self.answer not in content:
            got = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"expected a mapping with {self.answer!r}, got {got}")
        return parse_numbers(content[self.answer], count, repr(self.answer))


def read_pickle(data: bytes) -> Any:
    """A pickle of ``None``, booleans, numbers, texts, bytes, lists, tuples and mappings.

    The opcodes are gone through one by one; those that import, call or build objects are not known here, so no pickle
    can run code. Recursive values and those with more than a million opcodes are refused.

    Raises:
        ValueError: any other pickle, or no pickle.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    marks: list[int] = []

    def since_mark() -> list[Any]:
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    def pairs(values: list[Any]) -> list[tuple[Any, Any]]:
        if len(values) % 2:
            raise ValueError("a mapping has a key without a value")
        return list(zip(values[::2], values[1::2]))

    try:
        argument: Any
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            name = opcode.name
            if number > 1_000_000:
                raise ValueError("it has more than a million opcodes")
            if name in ("PROTO", "FRAME"):
                pass
            elif name in _VALUES:
                stack.append(_VALUES[name] if name in _CONSTANTS else argument)
            elif name in _EMPTY:
                stack.append(_EMPTY[name]())
            elif name == "MARK":
                marks.append(len(stack))
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                size = int(name[-1])
                if len(stack) < size:
                    raise ValueError("the stack is empty")
                stack[-size:] = [tuple(stack[-size:])]
            elif name in ("TUPLE", "LIST"):
                values = since_mark()
                stack.append(tuple(values) if name == "TUPLE" else values)
            elif name == "DICT":
                stack.append(dict(pairs(since_mark())))
            elif name in ("APPEND", "APPENDS"):
                values = since_mark() if name == "APPENDS" else [stack.pop()]
                _expect(stack[-1], list).extend(values)
            elif name in ("SETITEM", "SETITEMS"):
                values = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                _expect(stack[-1], dict).update(pairs(values))
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                stack.append(memo[argument])
            elif name == "STOP":
                if len(stack) != 1:
                    raise ValueError("more than one value is left")
                return stack[0]
            else:
                raise ValueError(f"{name} makes something else than plain values, and was not run")
    except (ValueError, IndexError, KeyError, TypeError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        reason = error if isinstance(error, ValueError) else type(error).__name__
        raise ValueError(f"expected a pickle of plain numbers and texts: {reason}") from error
    raise ValueError("expected a pickle of plain numbers and texts: it ends too early")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
# opcodes that put their argument onto the stack
_VALUES: dict[str, Any] = {
    **_CONSTANTS,
    **dict.fromkeys(
        ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE",
         "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8")
    ),
}  # fmt: skip
_EMPTY: dict[str, type] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"got {type(value).__name__} where a {kind.__name__} grows")
    return value


def images_base64(pixels: Tensor, quality: int | None) -> list[str]:
    """The middle frame of each ``[B, F, C, H, W]`` image as base64 of a PNG file, or of a JPEG file of ``quality``."""
    kind = "PNG" if quality is None else "JPEG"
    frames = to_arrays(pixels[:, pixels.shape[1] // 2 :][:, :1])[:, 0]
    return [base64.b64encode(encode(frame, kind, quality or 95)).decode("ascii") for frame in frames]


def to_json(content: Any) -> bytes:
    """JSON of a request.

    Raises:
        TypeError: prompts or metadata that JSON cannot hold.
    """
    try:
        return json.dumps(content, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise TypeError(f"prompts, metadata: cannot be sent to a reward server as JSON ({error})") from error


def _lists_of_mappings(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(isinstance(entry, dict) for entry in value)
