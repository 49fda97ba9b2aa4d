"""Images and videos for trackers, each in the tracker's own form, with its caption."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .grids import frames_of

# of a video's GIF; trackers show nothing else without an encoder of their own
_FRAMES_PER_SECOND = 8


def send(tracker: Any, kind: str, iteration: int, images: Any, captions: Sequence[str], page: Image.Image) -> None:
    """Gives images, or videos as videos, to one tracker.

    TensorBoard, W&B, trackio and SwanLab get each with its caption. A tracker that only knows ``log_images`` gets
    ``page``, one that does not know it nothing.

    Args:
        tracker: one of accelerate's, or of a class derived from its ``GeneralTracker``.
        kind: ``"rollout"``, ``"eval"`` or the like: the name under which they are filed.
        iteration: after which they were drawn.
        images: a batch, or a list of what :func:`~flowdppo_fast.runs.grids.frames_of` takes.
        captions: a text per image.
        page: all of them on one.
    """
    if tracker.name in _SENDERS:
        _SENDERS[tracker.name](tracker, kind, iteration, [frames_of(image) for image in images], captions)
    elif hasattr(tracker, "log_images"):
        import numpy as np

        tracker.log_images({kind: np.asarray(page)[None]}, step=iteration)


def gif(frames: Sequence[Image.Image]) -> io.BytesIO:
    """A video that repeats itself, as a file to be read."""
    file = io.BytesIO()
    first, *others = [frame.convert("RGB") for frame in frames]
    duration = 1000 // _FRAMES_PER_SECOND
    # frames that are equal would be joined into one of the sum of their times
    first.save(file, format="GIF", save_all=True, append_images=others, duration=duration, loop=0)
    file.seek(0)
    return file


def _tensorboard(tracker: Any, kind: str, iteration: int, images: Sequence, captions: Sequence[str]) -> None:
    from tensorboard.compat.proto.summary_pb2 import Summary

    writer = tracker.writer
    for place, (frames, caption) in enumerate(zip(images, captions)):
        file = io.BytesIO()
        if len(frames) > 1:
            file = gif(frames)
        else:
            frames[0].convert("RGB").save(file, format="PNG")
        width, height = frames[0].size
        # the writer's own way to a video needs an encoder; its files show any picture that a browser does
        picture = Summary.Image(encoded_image_string=file.getvalue(), width=width, height=height, colorspace=3)
        summary = Summary(value=[Summary.Value(tag=f"{kind}/{place}", image=picture)])
        writer._get_file_writer().add_summary(summary, iteration)
        writer.add_text(f"{kind}/{place}", caption, iteration)


def _wandb(tracker: Any, kind: str, iteration: int, images: Sequence, captions: Sequence[str]) -> None:
    import wandb

    media = [
        wandb.Video(gif(frames), caption=caption, format="gif")
        if len(frames) > 1
        else wandb.Image(frames[0], caption=caption)
        for frames, caption in zip(images, captions)
    ]
    tracker.log({kind: media}, step=iteration)


def _trackio(tracker: Any, kind: str, iteration: int, images: Sequence, captions: Sequence[str]) -> None:
    import tempfile

    import trackio

    with tempfile.TemporaryDirectory() as folder:
        media = {}
        for place, (frames, caption) in enumerate(zip(images, captions)):
            if len(frames) > 1:
                # its own way from arrays to a video needs an encoder
                path = Path(folder, f"{place}.gif")
                path.write_bytes(gif(frames).getvalue())
                media[f"{kind}/{place}"] = trackio.Video(path, caption=caption)
            else:
                media[f"{kind}/{place}"] = trackio.Image(frames[0], caption=caption)
        tracker.log(media, step=iteration)


def _swanlab(tracker: Any, kind: str, iteration: int, images: Sequence, captions: Sequence[str]) -> None:
    import swanlab

    media = [
        swanlab.Video(gif(frames), caption=caption) if len(frames) > 1 else swanlab.Image(frames[0], caption=caption)
        for frames, caption in zip(images, captions)
    ]
    tracker.log({kind: media}, step=iteration)


_SENDERS: dict[str, Callable[[Any, str, int, Sequence, Sequence[str]], None]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "swanlab": _swanlab,
}
