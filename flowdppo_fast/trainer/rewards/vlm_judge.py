"""A vision-language model as judge, behind any endpoint that speaks OpenAI's chat API (vLLM, SGLang)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .http import HTTPReward
from .protocols import images_base64, to_json
from .wire import excerpt, parse_json

DEFAULT_TEMPLATE = (
    "You are shown an image that was made for this caption: {prompt}\n"
    "Say how well the image shows what the caption asks for, from 1 (not at all) to 5 (completely). "
    "End with one line: Score: <number>"
)


class VLMJudge(HTTPReward):
    """The score that a vision-language model gives, one request per image; float32 ``[B]`` on the CPU.

    Times, retries and what is an error are those of :class:`~.http.HTTPReward`. An answer without a score, one that is
    out of range, and a refusal are errors too, or with ``unparsable="abstain"`` an abstention (NaN), which leaves the
    image out of its group. None of them is ever a 0.

    Args:
        url: of the endpoint, ``http://host:8000/v1/chat/completions``.
        model: name that the server knows the judge by.
        template: what is asked, with ``{prompt}`` and, in the same way, keys of the sample's metadata.
        pattern: regular expression whose first group is the score; the last place where it matches counts.
        low, high: range of scores, mapped to [0, 1].
        answers: instead of ``pattern``, texts of one token and what they are worth, such as ``{"Yes": 1, "No": 0}``:
            the mean of the worths under the probabilities of the answer's first token (``logprobs`` of the API), as in
            VQAScore (arXiv 2404.01291).
        unparsable: ``"error"`` or ``"abstain"``.
        max_tokens: longest answer.
        request: further entries of the request, such as ``{"chat_template_kwargs": {...}}``.
        quality: of JPEG files; None sends PNG.
        options: see :class:`~.http.HTTPReward`; ``parallel`` requests run at a time (16).

    Raises:
        ValueError: settings out of range, or a template that needs something that a sample does not have.
        RewardServerError: no score, when called.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        template: str = DEFAULT_TEMPLATE,
        pattern: str = r"[Ss]core:?\s*\**\s*(-?\d+(?:\.\d+)?)",
        low: float = 1.0,
        high: float = 5.0,
        answers: Mapping[str, float] | None = None,
        unparsable: str = "error",
        max_tokens: int = 512,
        request: Mapping[str, Any] | None = None,
        quality: int | None = None,
        parallel: int = 16,
        **options: Any,
    ):
        if unparsable not in ("error", "abstain"):
            raise ValueError(f"unparsable: got {unparsable!r}, expected 'error' or 'abstain'")
        if not low < high:
            raise ValueError(f"low, high: got {low:g} and {high:g}, expected low < high")
        if re.compile(pattern).groups < 1:
            raise ValueError(f"pattern: got {pattern!r}, expected a group for the score")
        super().__init__(url, batch_size=1, parallel=parallel, **options)
        self.model, self.template, self.pattern = model, template, re.compile(pattern)
        self.low, self.high, self.answers = low, high, dict(answers or {})
        self.may_abstain = unparsable == "abstain"
        self.max_tokens, self.request, self.image_quality = max_tokens, dict(request or {}), quality

    def encode(self, pixels: Tensor, prompts: Sequence[Any], metadata: Sequence[Mapping]) -> bytes:
        """One chat with one image."""
        (image,), kind = images_base64(pixels, self.image_quality), "png" if self.image_quality is None else "jpeg"
        try:
            question = self.template.format_map({**metadata[0], "prompt": prompts[0]})
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"template: needs {error}, expected 'prompt' or a key of the metadata, which has {sorted(metadata[0])}"
            ) from error
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{image}"}},
            {"type": "text", "text": question},
        ]
        asked: dict[str, Any] = {
            "model": self.model, "temperature": 0, "max_tokens": 1 if self.answers else self.max_tokens,
            "messages": [{"role": "user", "content": content}],
        }  # fmt: skip
        if self.answers:
            asked |= {"logprobs": True, "top_logprobs": 20}
        return to_json({**asked, **self.request})

    def parse(self, answer: bytes, count: int) -> Tensor:
        """The score ``[1]`` in an answer, NaN for an abstention."""
        try:
            choice = parse_json(answer)["choices"][0]
            message = choice["message"]
            text = message.get("content") or ""
            refusal = message.get("refusal")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"expected a chat completion with one choice, got {excerpt(answer)}") from error
        value = None
        if refusal is None and isinstance(text, str):
            value = self._from_tokens(choice) if self.answers else self._from_text(text)
        if value is not None:
            return torch.tensor([value], dtype=torch.float32)
        if self.may_abstain:
            return torch.tensor([math.nan])
        said = excerpt(str(refusal if refusal is not None else text).encode())
        kind = "a refusal" if refusal is not None else "no score from the range"
        raise ValueError(f"{kind} in {said}; unparsable='abstain' leaves such an image out of its group")

    def _from_text(self, text: str) -> float | None:
        found = self.pattern.findall(text)
        if not found:
            return None
        last = found[-1] if isinstance(found[-1], str) else found[-1][0]
        try:
            value = float(last)
        except ValueError:
            return None
        return (value - self.low) / (self.high - self.low) if self.low <= value <= self.high else None

    def _from_tokens(self, choice: Any) -> float | None:
        """Mean worth of the known answers, by their probabilities; None if none of them is among the likely tokens."""
        try:
            likely = choice["logprobs"]["content"][0]["top_logprobs"]
            weights = [(entry["token"].strip(), math.exp(entry["logprob"])) for entry in likely]
        except (KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError("expected logprobs of the first token; the server must support top_logprobs") from error
        known = [(self.answers[token], weight) for token, weight in weights if token in self.answers]
        total = sum(weight for _, weight in known)
        return sum(worth * weight for worth, weight in known) / total if total > 0 else None
