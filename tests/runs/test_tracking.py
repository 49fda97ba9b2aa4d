"""What a run writes: metrics that survive kills, trackers, plots, pages of images."""

from __future__ import annotations

import io
import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image, ImageDraw, ImageFont

from flowdppo_fast.runs import logs, plots
from flowdppo_fast.runs.grids import caption, frames_of, image_grid
from flowdppo_fast.runs.logs import METRICS_FILE, drop_later_lines, from_json
from flowdppo_fast.runs.tracking import RunLog


class MemoryTracker(GeneralTracker):
    """A tracker of accelerate's kind that keeps what it is given."""

    name = "memory"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    @property
    def tracker(self):
        return self.calls

    def start(self):
        self.calls.append(("start",))

    def store_init_configuration(self, values):
        self.calls.append(("config", values))

    def log(self, values, step=None, **kwargs):
        self.calls.append(("log", step, values))

    def log_images(self, values, step=None, **kwargs):
        self.calls.append(("images", step, {key: value.shape for key, value in values.items()}))

    def finish(self):
        self.calls.append(("finish",))


def metrics_of(iteration: int, **more) -> dict:
    return {
        "iteration": iteration, "reward": 0.25 * iteration, "kl_new_old_mean": 2e-6,
        "kl_new_old_nats": 1e-3 * iteration, "masked_fraction": 0.125, "grad_norm": 0.5,
        "seconds_sampling": 2.0, "seconds_updates": 3.0, **more,
    }  # fmt: skip


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def quiet(accelerator, folder, **options) -> RunLog:
    return RunLog(accelerator, folder, **{"progress": False, "plot_every": None, **options})


def lines_of(folder) -> list[dict]:
    return [from_json(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def test_metrics_go_through_a_kill(accelerator, tmp_path):
    folder = tmp_path / "run"
    log = quiet(accelerator, folder)
    log.start()
    for iteration in (1, 2, 3):
        log.iteration(metrics_of(iteration, ratio_max=math.inf if iteration == 1 else 1.0))
    # on the disk before anything is closed
    assert [m["iteration"] for m in lines_of(folder)] == [1, 2, 3]
    with open(folder / METRICS_FILE, "a") as file:
        file.write('{"iteration": 4, "rew')
    drop_later_lines(folder / METRICS_FILE, 2)
    history = lines_of(folder)
    assert history == [metrics_of(1, ratio_max=math.inf), metrics_of(2, ratio_max=1.0)]
    log = quiet(accelerator, folder)
    log.start(history)
    log.iteration(metrics_of(3, reward=7.0))
    log.close()
    assert [m["reward"] for m in lines_of(folder)] == [0.25, 0.5, 7.0]
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "metrics.png"]


def test_lines_after_a_damaged_one_are_dropped(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_text('{"iteration": 1}\n{"iter\n{"iteration": 2}\n')
    drop_later_lines(path, 3)
    assert lines_of(tmp_path) == [{"iteration": 1}]
    drop_later_lines(tmp_path / "nowhere", 3)
    assert not (tmp_path / "nowhere").exists()


def test_lines_are_synced_before_the_call_returns(accelerator, tmp_path, monkeypatch):
    log = quiet(accelerator, tmp_path)
    log.start()
    sizes = []
    sync = os.fsync
    monkeypatch.setattr(logs.os, "fsync", lambda fd: sizes.append(os.fstat(fd).st_size) or sync(fd))
    log.iteration(metrics_of(1))
    assert sizes == [(tmp_path / "metrics.jsonl").stat().st_size]
    assert sizes[0] == len(json.dumps(metrics_of(1))) + 1
    log.close()


def test_trackers_get_numbers_settings_and_images(accelerator, tmp_path):
    tracker = MemoryTracker()
    config = {"run": {"seed": 3, "trackers": []}, "objective": {"threshold": None, "name": "dppo"}}
    with quiet(accelerator, tmp_path, trackers=(tracker,), config=config) as log:
        log.start()
        log.iteration(metrics_of(1))
        log.images("eval", 1, torch.zeros(2, 3, 64, 64), ["a", "b"])
    flat = {"run.seed": 3, "run.trackers": "[]", "objective.threshold": "null", "objective.name": "dppo"}
    numbers = metrics_of(1)
    del numbers["iteration"]
    page = Image.open(tmp_path / "images" / "eval-000001.png")
    assert tracker.calls == [
        ("start",),
        ("config", flat),
        ("log", 1, numbers),
        ("images", 1, {"eval": (1, page.height, page.width, 3)}),
        ("finish",),
    ]
    assert accelerator.trackers == []


def test_a_continued_run_does_not_log_its_settings_again(accelerator, tmp_path):
    tracker = MemoryTracker()
    with quiet(accelerator, tmp_path, trackers=(tracker,), config={"run": {"seed": 3}}) as log:
        log.start([metrics_of(1)])
    assert tracker.calls == [("start",), ("finish",)]


def test_tensorboard(accelerator, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start in (0, 2):
        with quiet(accelerator, tmp_path, trackers=("tensorboard",), project="digits", config={"a": {"b": 1}}) as log:
            log.start([metrics_of(i) for i in range(1, start + 1)])
            for iteration in range(start + 1, 5):
                log.iteration(metrics_of(iteration, reward=float(10 * start + iteration)))
            log.images("rollout", 4, torch.rand(1, 3, 8, 8), ["a"])
            log.images("eval", 4, torch.rand(1, 5, 3, 8, 8), ["a video"])
    events = EventAccumulator(str(tmp_path / "tensorboard" / "digits"))
    events.Reload()
    # what the first start logged after iteration 2 was done again
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0)]
    (image,), (video,) = (events.Images(f"{kind}/0")[-1:] for kind in ("rollout", "eval"))
    assert image.step == video.step == 4
    assert Image.open(io.BytesIO(image.encoded_image_string)).size == (8, 8)
    assert Image.open(io.BytesIO(video.encoded_image_string)).n_frames == 5
    assert events.Tensors("eval/0/text_summary")[-1].tensor_proto.string_val == [b"a video"]


def test_a_tracker_that_is_not_installed(accelerator, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    with pytest.raises(ValueError, match=r"\['wandb'\] not installed, expected: pip install wandb"):
        quiet(accelerator, tmp_path, trackers=("wandb",))
    with pytest.raises(ValueError, match="Unsupported logging capability: paper"):
        quiet(accelerator, tmp_path, trackers=("paper",))


def test_only_the_main_process_writes(tmp_path):
    other = SimpleNamespace(is_main_process=False, trackers=[], log=None)
    log = quiet(other, tmp_path / "run")
    log.start()
    log.iteration(metrics_of(1))
    assert log.images("eval", 1, torch.zeros(1, 3, 8, 8), ["a"]) is None
    log.close()
    assert not (tmp_path / "run").exists()


def test_the_progress_bar_says_what_matters(accelerator, tmp_path, capsys):
    with quiet(accelerator, tmp_path, progress=True, total=4) as log:
        log.start([metrics_of(1)])
        log.iteration(metrics_of(2, samples_per_second=12.5))
    said = capsys.readouterr().err
    assert "2/4" in said
    for part in ("reward=0.500", "kl=2.0e-06", "masked=12.5%", "samples/s=12.5"):
        assert part in said


@pytest.mark.parametrize(("every", "lengths"), [(2, [2, 4, 5]), (None, [5]), (0, [])])
def test_plots_are_drawn_on_time_and_replaced_whole(accelerator, tmp_path, monkeypatch, every, lengths):
    drawn = []
    monkeypatch.setattr(plots, "plot_run", lambda history, path: drawn.append((len(history), path.name)))
    with quiet(accelerator, tmp_path, plot_every=every) as log:
        log.start()
        for iteration in range(1, 6):
            log.iteration(metrics_of(iteration))
    assert drawn == [(length, "metrics.png") for length in lengths]


def test_what_a_plot_shows(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: figures.append(self) or save(self, *args, **kwargs)
    )
    history = [metrics_of(i, **{"reward/bold": 0.1, "reward/clear": float(i)}) for i in range(1, 5)]
    history[1]["grad_norm"] = math.inf
    history[0]["eval/reward"], history[2]["eval/reward"], history[3]["eval_final/reward"] = 0.1, 0.2, 0.3
    plots.plot_run(history, tmp_path / "metrics.png")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.png"]
    with Image.open(tmp_path / "metrics.png") as image:
        assert min(image.size) > 500
    lines = {
        (axis.get_ylabel().split("\n")[0], line.get_label()): list(zip(*line.get_data()))
        for axis in figures[0].axes
        for line in axis.lines
    }
    assert lines["reward", "weighted sum"] == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]
    assert lines["reward", "clear"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    # measured before the iteration that logs it, and after the last one
    assert lines["reward", "reward (evaluation)"] == [(0, 0.1), (2, 0.2), (4, 0.3)]
    assert lines["rows dropped", "all"] == [(i, 12.5) for i in range(1, 5)]
    assert math.isnan(lines["gradient norm", "mean over updates"][1][1])
    assert lines["time of an iteration", "updates"] == [(i, 3.0) for i in range(1, 5)]
    by_label = {axis.get_ylabel().split("\n")[0]: axis for axis in figures[0].axes}
    assert by_label["KL(old || new)"].get_yscale() == "log"
    assert by_label["reward"].get_yscale() == "linear"
    # no two lines of a panel look alike, also without colour
    for axis in figures[0].axes:
        looks = [(line.get_linestyle(), line.get_color()) for line in axis.lines]
        assert len({style for style, _ in looks}) == len({colour for _, colour in looks}) == len(looks)


def test_a_plot_of_a_run_without_updates_or_kl(tmp_path):
    plots.plot_run([{"iteration": 1, "reward": 1.0, "kl_new_old_nats": 0.0}], tmp_path / "metrics.png")
    assert (tmp_path / "metrics.png").stat().st_size > 0


PIXELS = np.array([[[0, 0, 0], [255, 0, 0]], [[0, 255, 0], [10, 20, 30]]], dtype=np.uint8)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(PIXELS),
        PIXELS,
        PIXELS / 255.0,
        torch.from_numpy(PIXELS).movedim(-1, 0),
        (torch.from_numpy(PIXELS).movedim(-1, 0) / 255.0).requires_grad_(),
    ],
    ids=["pil", "uint8 array", "array", "uint8 tensor", "tensor"],
)
def test_what_pipelines_return_becomes_frames(image):
    (frame,) = frames_of(image)
    assert np.array_equal(np.asarray(frame), PIXELS)


def test_frames_of_videos_grey_images_and_odd_values():
    video = torch.rand(5, 3, 4, 6)
    frames = frames_of(video)
    assert [frame.size for frame in frames] == [(6, 4)] * 5
    assert np.array_equal(np.asarray(frames[3]), (video[3].movedim(0, -1) * 255).round().byte().numpy())
    assert frames_of(frames) == frames
    (grey,) = frames_of(torch.tensor([[[-1.0, 0.5], [2.0, math.nan]]], dtype=torch.bfloat16))
    assert np.asarray(grey).tolist() == [[0, 128], [255, 0]]


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.zeros(16, 8, 8), ValueError, "got Tensor of shape \\[16, 8, 8\\], expected pixels"),
        (torch.zeros(8, 8), ValueError, "got Tensor of shape \\[8, 8\\]"),
        ("a.png", TypeError, "got str"),
        ([], TypeError, "got list"),
    ],
)
def test_what_is_no_image(image, error, message):
    with pytest.raises(error, match=message):
        frames_of(image)


def test_a_page_holds_every_image_at_its_place():
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]
    images = torch.stack([torch.tensor(c).view(3, 1, 1).expand(3, 16, 16) / 255.0 for c in colours])
    page = np.asarray(image_grid(images, [f"image {i}" for i in range(5)]))
    rows, columns = 2, 3
    height, width = page.shape[0] // rows, page.shape[1] // columns
    for place, colour in enumerate(colours):
        row, column = divmod(place, columns)
        # 16 pixels are shown as 128, the whole of them
        tile = page[row * height : (row + 1) * height, column * width : (column + 1) * width + 4]
        assert (tile == colour).all(-1).sum() == 128 * 128
    # dark letters on white beneath each image
    assert (page[128 + 4 : height, :width].min(-1) < 100).any()


def test_large_images_shrink_and_captions_wrap():
    page = image_grid(
        [Image.new("RGB", (640, 320), "red")], [caption("word " * 200, {"clip": 0.5, "jpeg": -2.0})], tile=160
    )
    assert page.width == 160 + 8
    assert page.height < 80 + 8 + 4 * 15 + 10
    assert caption("a cat", {"clip": 0.5, "jpeg": -2.0}) == "a cat\nclip 0.500  jpeg -2.000"
    assert caption("a cat\nand a dog", {"clip": 0.5}) == "a cat and a dog\nclip 0.500"
    assert image_grid([Image.new("RGB", (640, 320))], [""], tile=None).width == 640 + 8


def test_no_reward_is_cut_off_under_small_images(monkeypatch):
    drawn: list[tuple[float, str]] = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda _, at, line, **how: drawn.append((at[0], line)))
    rewards = {"ink": 0.25, "brightness": -12.5, "agreement_with_the_prompt": 0.125}
    prompts = ["mmmm " * 30, "a", "w" * 300]
    page = image_grid(torch.zeros(3, 3, 16, 16), [caption(prompt, rewards) for prompt in prompts], columns=3)
    shown = ["ink 0.250  brightness -12.500", "agreement_with_the_prompt 0.125"]
    assert [line for _, line in drawn if line in shown] == shown * 3
    assert len(drawn) == 2 + 1 + 1 + 3 * 2
    assert sum(line.endswith(" ...") for _, line in drawn) == 2
    font = ImageFont.load_default(12)
    # each within its own column
    assert all(left % (page.width // 3) + font.getlength(line) <= page.width // 3 + 4 for left, line in drawn)


def test_videos_are_strips_of_their_frames():
    video = torch.zeros(20, 3, 128, 128)
    video[0, 0], video[19, 1] = 1.0, 1.0
    page = np.asarray(image_grid([video, video], ["a", "b"]))
    # 8 of 20 frames side by side, a row per video
    assert page.shape[1] == 8 * 128 + 7 * 2 + 8
    assert (page == (255, 0, 0)).all(-1).sum() == 2 * 128 * 128
    assert (page == (0, 255, 0)).all(-1).sum() == 2 * 128 * 128


def test_captions_are_counted():
    with pytest.raises(ValueError, match="captions: got 1 for 2 images"):
        image_grid(torch.zeros(2, 3, 8, 8), ["a"])


def test_a_plot_that_fails_does_not_hide_what_ended_the_run(accelerator, tmp_path, monkeypatch, caplog):
    def fail(*arguments):
        raise OSError("no room for a plot")

    monkeypatch.setattr(plots, "plot_run", fail)

    def run():
        with quiet(accelerator, tmp_path) as log:
            log.start()
            log.iteration(metrics_of(1))
            raise RuntimeError("the first error")

    with pytest.raises(RuntimeError, match="the first error"):
        run()
    assert "no room for a plot" in caplog.text
    with (
        pytest.raises(RuntimeError, match=r"could not be written \(no room for a plot\)"),
        quiet(accelerator, tmp_path) as log,
    ):
        log.start([metrics_of(1)])
