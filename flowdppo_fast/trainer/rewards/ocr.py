"""Is the asked text in the image? Read by PP-OCR's recogniser, whose weights lie in the ``rapidocr`` wheel."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .images import DEFAULT_FRAMES, check_all_positive, scored_pixels, to_arrays

Output = Literal["edit", "likelihood", "both"]
Lines = Literal["detect", "one"]
_RECOGNISER = "PP-OCRv6_rec_small.onnx"
_LINE_HEIGHT = 48
_LEAST_PROBABILITY = 1e-8
_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')


class OCRReward:
    """How much of the asked text a reader finds in the image; float32 ``[B]`` on the CPU, in [0, 1].

    The asked text is ``metadata[key]``, a text or a list of lines, or else the first quoted part of the prompt. Case
    and white space do not count, as in flow_grpo (``flow_grpo/ocr.py``). Two forms:

    - ``"edit"``: ``1 - min(distance, length) / length`` with the Levenshtein distance between what is read and what is
      asked. Where the asked text is part of what is read the distance is 0, as in flow_grpo; ``anywhere=False`` takes
      it as it is.
    - ``"likelihood"``: the reader's probability of the asked text per character, ``exp(log p / length)`` with the CTC
      likelihood (Graves et al., 2006) ``log p``. Upper and lower case letters share their probability. It grades damage
      that leaves the reading as it is, and text that is far from readable, where edit distance sees no difference.

    Nothing is downloaded. The reader runs on the CPU, about 10 ms for a line of 24x72 pixels.

    Args:
        output: ``"edit"``, ``"likelihood"``, or ``"both"`` from one reading: a mapping of these two names.
        lines: ``"detect"`` finds lines of text with PP-OCR's detector and reads them from top to bottom; ``"one"``
            reads the whole image as one line, which needs no detector and suits small pages.
        anywhere: for ``"edit"``: other text beside the asked one costs nothing.
        recogniser: ONNX file of another PP-OCR recogniser with its characters in its metadata; by default that of the
            ``rapidocr`` package.
        key: where a sample's metadata has the text.
        threads: of the reader; None takes torch's number.
        batch_size: lines per call of the recogniser.
        frames: frames of a video that are read (:func:`~.images.select_frames`); the reward is their mean.

    Raises:
        ValueError: settings out of range, or a sample without a text that the reader has the characters of.
        RuntimeError: ``rapidocr`` or ``onnxruntime`` is not installed.
    """

    def __init__(
        self,
        output: Output = "edit",
        *,
        lines: Lines = "detect",
        anywhere: bool = True,
        recogniser: str | Path | None = None,
        key: str = "text",
        threads: int | None = None,
        batch_size: int = 32,
        frames: int = DEFAULT_FRAMES,
    ):
        for name, value, known in (("output", output, Output), ("lines", lines, Lines)):
            if value not in get_args(known):
                raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(get_args(known))}")
        check_all_positive(batch_size=batch_size, frames=frames, threads=1 if threads is None else threads)
        self.output, self.lines, self.anywhere, self.key = output, lines, anywhere, key
        self.threads, self.batch_size, self.frames = threads, batch_size, frames
        file = packaged_model("rapidocr", _RECOGNISER) if recogniser is None else Path(recogniser).expanduser()
        self._reader = Recogniser(file, threads)
        self._detector = _load_detector(threads) if lines == "detect" else None

    def __call__(
        self, images: Any, prompts: Sequence[Any], metadata: Sequence[dict] | None = None
    ) -> Tensor | dict[str, Tensor]:
        pixels = scored_pixels(images, prompts, self.frames)
        asked = [self._asked(place, prompts, metadata) for place in range(len(prompts))]
        count = pixels.shape[1]
        texts = [text for text in asked for _ in range(count)]
        pages = self._pages(pixels)
        named = {}
        if self.output != "likelihood":
            found = [normalise("".join(self._reader.decode(line) for line in page)) for page in pages]
            named["edit"] = torch.tensor([self._similarity(read, text) for read, text in zip(found, texts)])
        if self.output != "edit":
            self._reader.check(asked)
            named["likelihood"] = self._reader.likelihood([self._frames(page) for page in pages], texts)
        named = {name: scores.view(-1, count).mean(1) for name, scores in named.items()}
        return named if self.output == "both" else named[self.output]

    def read(self, images: Any) -> list[str]:
        """What stands in each image (the first scored frame of a video), without white space and in lower case."""
        pixels = scored_pixels(images, range(len(images)), 1)
        return [normalise("".join(self._reader.decode(line) for line in page)) for page in self._pages(pixels)]

    def _asked(self, place: int, prompts: Sequence[Any], metadata: Sequence[dict] | None) -> str:
        given = (metadata[place] if metadata else {}).get(self.key)
        if given is None and isinstance(prompts[place], str):
            quoted = _QUOTED.search(prompts[place])
            given = quoted and (quoted[1] or quoted[2])
        lines = given if isinstance(given, (list, tuple)) else [given]
        text = normalise("".join(line for line in lines if isinstance(line, str)))
        if not text:
            raise ValueError(
                f"ocr: sample {place} asks for no text, expected it under {self.key!r} in its metadata or quoted in "
                f"its prompt, which is {prompts[place]!r:.80}"
            )
        return text

    def _similarity(self, read: str, asked: str) -> float:
        if self.anywhere and asked in read:
            return 1.0
        return 1 - min(edit_distance(read, asked), len(asked)) / len(asked)

    def _pages(self, pixels: Tensor) -> list[list[np.ndarray]]:
        """For each frame its lines, and for each line the reader's probabilities ``[T, classes]``."""
        arrays = to_arrays(pixels.expand(-1, -1, 3, -1, -1)).reshape(-1, *pixels.shape[-2:], 3)
        lines = [[array] if self._detector is None else list(find_lines(self._detector, array)) for array in arrays]
        read = iter(self._reader([line for page in lines for line in page], self.batch_size))
        return [[next(read) for _ in page] for page in lines]

    @staticmethod
    def _frames(lines: list[np.ndarray]) -> np.ndarray:
        """The frames of all lines one after the other, with a certain blank between two lines."""
        if not lines:
            return np.zeros((0, 1), np.float32)
        blank = np.zeros((1, lines[0].shape[1]), np.float32)
        blank[0, 0] = 1
        return np.concatenate([part for line in lines for part in (line, blank)])


class Recogniser:
    """A PP-OCR text line recogniser on onnxruntime.

    Args:
        file: ONNX file whose metadata has the characters, one a line.
        threads: of its session; None takes torch's number.

    Raises:
        ValueError: no such file. RuntimeError: ``onnxruntime`` is not installed.
    """

    def __init__(self, file: Path, threads: int | None = None):
        if not file.is_file():
            raise ValueError(f"recogniser: got {str(file)!r}, which is no file, expected an ONNX file of PP-OCR")
        self._session = _session(file, threads)
        listed = self._session.get_modelmeta().custom_metadata_map.get("character")
        if listed is None:
            raise ValueError(f"recogniser: {file.name} has no characters in its metadata, expected PP-OCR's")
        # class 0 is CTC's blank, the last one a space
        self.characters = ["", *listed.splitlines(), " "]
        self._classes: dict[str, list[int]] = {}
        for number, character in enumerate(self.characters):
            self._classes.setdefault(normalise(character), []).append(number)

    def __call__(self, lines: Sequence[np.ndarray], batch_size: int = 32) -> list[np.ndarray]:
        """Probabilities ``[T, classes]`` of each uint8 ``[H, W, 3]`` line; T depends on its shape, not on others."""
        found: list[np.ndarray] = []
        prepared = [_prepare(line) for line in lines]
        start = 0
        while start < len(prepared):
            end = start + 1
            while end < min(len(prepared), start + batch_size) and prepared[end].shape == prepared[start].shape:
                end += 1
            name = self._session.get_inputs()[0].name
            found += list(self._session.run(None, {name: np.stack(prepared[start:end])})[0])
            start = end
        if found and found[0].shape[1] != len(self.characters):
            raise ValueError(f"recogniser: got {found[0].shape[1]} classes, expected {len(self.characters)}")
        return found

    def decode(self, frames: np.ndarray) -> str:
        """The most probable class of each frame, without repetitions and blanks."""
        best = frames.argmax(-1)
        changed = np.concatenate([[True], best[1:] != best[:-1]])
        return "".join(self.characters[number] for number in best[changed])

    def check(self, texts: Sequence[str]) -> None:
        """Raises ValueError for a text with a character that the reader does not have."""
        for text in texts:
            unknown = sorted(set(text) - set(self._classes))
            if unknown:
                raise ValueError(f"ocr: the reader has no {', '.join(map(repr, unknown))}, which {text!r} asks for")

    def likelihood(self, pages: Sequence[np.ndarray], texts: Sequence[str]) -> Tensor:
        """``exp(log p(text) / length)`` of each page of frames ``[T, classes]``, float32 ``[B]``; 0 without frames."""
        letters = sorted(set("".join(texts)))
        groups = [self._classes[""], *(self._classes[letter] for letter in letters)]
        longest = max((len(page) for page in pages), default=0)
        log_probs = torch.zeros(max(longest, 1), len(pages), len(groups))
        for row, page in enumerate(pages):
            for column, classes in enumerate(groups):
                if len(page):
                    total = torch.from_numpy(page[:, classes].sum(-1))
                    log_probs[: len(page), row, column] = total.clamp(_LEAST_PROBABILITY, 1).log()
        number = {letter: place + 1 for place, letter in enumerate(letters)}
        targets = torch.tensor([number[letter] for text in texts for letter in text])
        lengths, frames = torch.tensor([len(text) for text in texts]), torch.tensor([len(page) for page in pages])
        # a page with fewer frames than letters has no such reading: infinite loss, and a likelihood of 0
        loss = F.ctc_loss(log_probs, targets, frames.clamp_min(1), lengths, reduction="none")
        return torch.where(frames > 0, torch.exp(-loss / lengths), 0.0)


def normalise(text: str) -> str:
    """Without white space and in lower case."""
    return "".join(text.split()).lower()


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's: how many letters must be put in, left out or changed to make one text the other."""
    row = list(range(len(second) + 1))
    for place, letter in enumerate(first, 1):
        left = [place]
        for column, other in enumerate(second, 1):
            left.append(min(row[column] + 1, left[-1] + 1, row[column - 1] + (letter != other)))
        row = left
    return row[-1]


def packaged_model(package: str, file: str) -> Path:
    """A model file inside an installed package, which is not imported.

    Raises:
        RuntimeError: the package or the file is not there.
    """
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise RuntimeError(f"ocr: {package} is not installed, expected it with the reader's weights: {_INSTALL}")
    path = Path(found.origin).parent / "models" / file
    if not path.is_file():
        raise RuntimeError(f"ocr: this version of {package} has no {file}, expected another version: {_INSTALL}")
    return path


_INSTALL = "pip install 'flowdppo_fast[ocr]'"


def find_lines(detector: Any, page: np.ndarray) -> Iterator[np.ndarray]:
    """Lines of text in a uint8 ``[H, W, 3]`` page, straightened, from top to bottom and from left to right."""
    # what it knows is blue first
    boxes = detector(page[..., ::-1], use_det=True, use_cls=False, use_rec=False).boxes
    picture = Image.fromarray(page)
    for box in [] if boxes is None else np.asarray(boxes, dtype=np.float64):
        top_left, top_right, bottom_right, bottom_left = box
        width = max(np.linalg.norm(top_right - top_left), np.linalg.norm(bottom_right - bottom_left))
        height = max(np.linalg.norm(bottom_left - top_left), np.linalg.norm(bottom_right - top_right))
        corners = [*top_left, *bottom_left, *bottom_right, *top_right]
        size = (max(round(width), 1), max(round(height), 1))
        line = picture.transform(size, Image.Transform.QUAD, corners, Image.Resampling.BICUBIC)
        # letters below each other are read lying
        yield np.rot90(np.asarray(line)) if height >= 1.5 * width else np.asarray(line)


def _prepare(line: np.ndarray) -> np.ndarray:
    """``[H, W, 3]`` bytes as the recogniser takes them: float32 ``[3, 48, width]`` in [-1, 1], blue first."""
    height, width = line.shape[:2]
    size = (max(round(width * _LINE_HEIGHT / height), 8), _LINE_HEIGHT)
    scaled = np.asarray(Image.fromarray(np.ascontiguousarray(line)).resize(size, Image.Resampling.BICUBIC))
    return np.ascontiguousarray(scaled[..., ::-1].transpose(2, 0, 1), dtype=np.float32) / 127.5 - 1


def _session(file: Path, threads: int | None) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeError(f"ocr: onnxruntime is not installed, expected it to run the reader: {_INSTALL}") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    # waiting threads must not take the cores of the sampler, which runs at the same time
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _load_detector(threads: int | None) -> Any:
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise RuntimeError(
            f"ocr: lines='detect' needs rapidocr ({error}), expected it installed: {_INSTALL}"
        ) from error
    settings = {
        "Global.log_level": "critical",
        # as PaddleOCR has it: images are not enlarged, and those beyond 960 pixels made smaller
        "Det.limit_type": "max",
        "Det.limit_side_len": 960,
        "EngineConfig.onnxruntime.intra_op_num_threads": threads or torch.get_num_threads(),
    }
    return RapidOCR(params=settings)
