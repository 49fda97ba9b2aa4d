"""What every launch needs: how rows are cut up, where they lie in memory, the device, and the compiled kernel.

The cut depends on the shape alone, never on the device. Inside a program the compiler decides in which order numbers
are added up: an input gives the same bits again on one kind of GPU, with one version of Triton and rows aligned alike.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel

from ..rows import Form, RowSource

# 8 elements per thread and block: one 16-byte load per bf16 tensor, two per float32 tensor. Larger shares per thread
# raise registers (four accumulators each) faster than they raise the bytes in flight per SM.
BLOCK = 2048
NUM_WARPS = 8
# programs wanted before one takes several blocks: at 16 to a multiprocessor of a large GPU, the uneven end is about 3 %
# of the time. And the most blocks that one takes: what a program does once, adding up above all, is then 2.5 of its
# instructions per element, and partials are less than a thousandth of the latents
_PROGRAMS = 2048
_MAX_BLOCKS = 8
# partials that a warp of the small kernels loads at a time: 16 per thread
_WARP_TILE = 512
_MAX_SPLIT_BLOCK = 128
MEAN, MATCHING = int(Form.MEAN), int(Form.MATCHING)


class Cut(NamedTuple):
    """A row is cut into ``splits`` programs of ``blocks`` consecutive blocks each."""

    blocks: int
    splits: int


# cached, like all pure functions of the shape here, because a launch is mostly host time
@functools.cache
def cut(rows: int, numel: int) -> Cut:
    """The cut of ``rows`` rows of ``numel`` elements."""
    of_row = -(-numel // BLOCK)
    wanted = max(1, min(rows * of_row // _PROGRAMS, _MAX_BLOCKS))
    # a row's last program goes through all of its blocks, whether there is anything in them or not
    blocks = min(range(wanted, wanted // 2, -1), key=lambda count: -of_row % count)
    return Cut(blocks, -(-of_row // blocks))


class Tiles(NamedTuple):
    """How small kernels walk partials ``[rows, splits]``: in tiles ``[row_block, split_block]``."""

    row_block: int
    row_blocks: int
    split_block: int
    split_blocks: int


@functools.cache
def partial_tiles(rows: int, splits: int, num_warps: int = 1) -> Tiles:
    """Tiles for a program of ``num_warps``."""
    split_block = min(_power_of_two(splits), _MAX_SPLIT_BLOCK)
    row_block = min(_power_of_two(rows), num_warps * _WARP_TILE // split_block)
    return Tiles(row_block, -(-rows // row_block), split_block, -(-splits // split_block))


class EpilogueTiles(NamedTuple):
    """The epilogue's tiles of partials, and the blocks in which it then walks finished rows."""

    partials: Tiles
    row_block: int
    row_blocks: int
    num_warps: int


@functools.cache
def epilogue_tiles(rows: int, splits: int) -> EpilogueTiles:
    """One warp where it can, because it reduces by shuffles alone; more where rows or partials are many."""
    num_warps = 8 if max(4 * rows, rows * splits) > 4096 else 4 if rows * splits > 1024 else 1
    row_block = min(_power_of_two(rows), 32 * num_warps)
    return EpilogueTiles(partial_tiles(rows, splits, num_warps), row_block, -(-rows // row_block), num_warps)


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()


def vector_width(*stored: Tensor) -> int:
    """Elements that the widest of the stored tensors takes in 16 bytes: what a thread should hold side by side.

    Without the hint Triton would give a thread what 16 bytes of the narrowest input hold, and move wider results
    through shared memory on their way out.
    """
    return 16 // max([x.element_size() for x in stored])


class RowStrides(NamedTuple):
    """Row strides of several latents; ``rows1`` and ``outer`` are None when one stride per tensor finds every row."""

    rows1: int | None
    outer: tuple[int | None, ...]
    inner: tuple[int | None, ...]


_NO_OUTER = (None,) * 4


def row_strides(*latents: Tensor | None) -> RowStrides:
    """Strides as kernels take them: row ``r`` of a tensor starts at ``(r // rows1)*outer + (r % rows1)*inner``.

    Where all tensors allow it (the usual case) the two row dims collapse into one, which saves the kernel a division
    and the launch half of its strides. The first tensor is never None.
    """
    rows0, rows1, _ = latents[0].shape  # type: ignore[union-attr]
    return _row_strides(rows0, rows1, *[x if x is None else x.stride() for x in latents])


@functools.lru_cache(maxsize=1024)
def _row_strides(rows0: int, rows1: int, *strides: tuple[int, ...] | None) -> RowStrides:
    # a stride of a dim of size 1 is never taken: 0 keeps the alignment that wide loads need
    outer = tuple([s if s is None else s[0] if rows0 > 1 else 0 for s in strides])
    if rows1 == 1:
        return RowStrides(None, _NO_OUTER[: len(strides)], outer)
    inner = tuple([s if s is None else s[1] for s in strides])
    if rows0 == 1 or all(i is None or o == rows1 * i for o, i in zip(outer, inner)):  # type: ignore[operator]
        return RowStrides(None, _NO_OUTER[: len(strides)], inner)
    return RowStrides(rows1, outer, inner)


def step_arguments(
    step: Tensor | None, step_values: list[float], rows: int, like: Tensor
) -> tuple[Tensor | None, list[float] | tuple[None, None, None]]:
    """The table or the three numbers of a step, the other being None; ``like`` has the accumulation dtype.

    Triton passes python floats as float32, so float64 rows get a table, at the price of a copy to the device.
    """
    if step is None and like.dtype == torch.float64:
        step = like.new_tensor(step_values).repeat(rows, 1)
    return (None, step_values) if step is None else (step, (None, None, None))


class Geometry:
    """How the rows of a call lie and are cut, and what was prepared to launch on rows that lie so.

    Attributes:
        rows, numel: as the latents' ``[R0, R1, N]`` has them.
        strides: of ``new, old, drawn, reference``.
        prepared: kinds of launches, by what else they depend on; of whoever launches.
    """

    __slots__ = ("cut", "numel", "prepared", "rows", "strides")

    def __init__(self, rows0: int, rows1: int, numel: int, *strides: tuple[int, ...] | None) -> None:
        self.rows, self.numel = rows0 * rows1, numel
        self.strides = _row_strides(rows0, rows1, *strides)
        self.cut = cut(self.rows, numel)
        self.prepared: dict[Any, Any] = {}


geometry_at = functools.lru_cache(maxsize=1024)(Geometry)


def geometry_of(source: RowSource) -> Geometry:
    """The geometry of latents ``[R0, R1, N]``."""
    return geometry_at(*source.new.shape, *[x if x is None else x.stride() for x in source[:4]])


class Kind:
    """What launches of one kind share: all but tensors, floats and counters.

    Attributes:
        programs: how many.
        ints: integers that Triton may specialise on.
        constants: ``tl.constexpr`` parameters.
        overlaps: whether it is one of two launches of which the second may begin before the first one ends, where the
            GPU can do that; None for a kernel without the parameter ``OVERLAPS``.
        handles: what was compiled, by what Triton specialises on besides.
    """

    __slots__ = ("constants", "handles", "ints", "num_warps", "overlaps", "programs")

    def __init__(
        self,
        programs: int,
        num_warps: int,
        ints: tuple[int | None, ...],
        constants: tuple[Any, ...],
        overlaps: bool | None = None,
    ) -> None:
        self.overlaps = overlaps
        self.programs, self.num_warps, self.ints, self.constants = programs, num_warps, ints, constants
        self.handles: dict[tuple, tuple] = {}


# shapes that a run sees are few, and a kind that was dropped only costs Triton's own way once more
kind_of = functools.lru_cache(maxsize=1024)(Kind)


class Launcher:
    """A kernel, launched by the handle that Triton compiled for arguments of the same kind.

    Triton's own launch binds the arguments by name, works out their specialisation and looks it up by its string: most
    of a small loss's host time. Here that happens once per :class:`Kind` and, of tensors, dtype, 16-byte alignment and
    (AMD: buffers below 2 GB) the size of their memory; of floats nothing, if they are floats. That is no coarser than
    Triton's rules. What Triton reads from the environment when it compiles counts as it was at the first launch of a
    kind. Hooks on launches see every launch: then Triton's own way is taken.

    Parameters of the kernel are in the order ``tensors, floats, ints, counters, constants, OVERLAPS``; counters are
    integers annotated as int64, on which Triton does not specialise. ``OVERLAPS`` (programmatic dependent launch, from
    sm_90 on) is for two launches in a row: the first lets the second one start, the second (``waits``) does what needs
    none of the first one's results, and waits for them. What ran before both has ended by then.
    """

    def __init__(self, kernel: Any, *, fp_fusion: bool, waits: bool = False) -> None:
        self.kernel = kernel
        self._fp_fusion = fp_fusion
        self._waits = waits
        self._can_overlap: dict[int, bool] = {}
        self._compiled = isinstance(kernel, triton.JITFunction)
        self._driver: Any = None
        self._sizes_count = False

    def __call__(
        self,
        kind: Kind,
        tensors: tuple[Tensor | None, ...],
        floats: tuple[float | None, ...] = (),
        counters: tuple[int, ...] = (),
    ) -> None:
        """Launches on the device of the first tensor."""
        arguments = (*tensors, *floats, *kind.ints, *counters, *kind.constants)
        if not self._compiled:
            self._launch_by_name(kind, arguments if kind.overlaps is None else (*arguments, False))
            return
        driver = triton.runtime.driver.active
        device, own = driver.get_current_device(), tensors[0].get_device()  # type: ignore[union-attr]
        if own != device and own >= 0:
            # Triton launches on the current device
            with torch.cuda.device(own):
                self(kind, tensors, floats, counters)
            return
        if driver is not self._driver:
            self._driver, self._sizes_count = driver, driver.get_current_target().backend == "hip"
            self._can_overlap.clear()
        if kind.overlaps is not None:
            can = self._can_overlap.get(device)
            arguments += (kind.overlaps and (self._ask(device) if can is None else can),)
        runtime = knobs.runtime
        if (
            # hooks: a chain of them, or what somebody put in its place
            getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
            or getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
            or self.kernel.pre_run_hooks
            # another compilation than usual
            or runtime.debug
            or runtime.add_stages_inspection_hook
        ):
            self._launch_by_name(kind, arguments)
            return
        bits = 0
        # handles belong to the kernel and to the driver that loaded them
        key = [self, driver, device]
        for x in tensors:
            if x is None:
                key.append(None)
            else:
                key.append(x.dtype)
                bits |= x.data_ptr()
        for number in floats:
            key.append(float if number.__class__ is float else number)
        if bits % 16 != 0:
            key += [x is None or x.data_ptr() % 16 == 0 for x in tensors]
        if self._sizes_count:
            key += [x is None or x.untyped_storage().size() < 2**31 for x in tensors]
        found = tuple(key)
        handle = kind.handles.get(found)
        if handle is None:
            compiled = self._launch_by_name(kind, arguments)
            # nothing to keep where Triton was asked to compile in the background
            if isinstance(compiled, CompiledKernel):
                kind.handles[found] = (compiled.run, compiled.function, compiled.packed_metadata)
            return
        run, function, metadata = handle
        run(kind.programs, 1, 1, driver.get_current_stream(device), function, metadata, None, None, None, *arguments)

    def _ask(self, device: int) -> bool:
        """Whether the current device can start a launch before the one ahead of it has ended."""
        target = self._driver.get_current_target()
        can = self._can_overlap[device] = target.backend == "cuda" and target.arch >= 90
        return can

    def _launch_by_name(self, kind: Kind, arguments: tuple) -> Any:
        # an option that Triton's compiler for AMD does not know
        options = {"launch_pdl": True} if self._waits and arguments[-1] else {}
        return self.kernel[(kind.programs,)](
            *arguments, num_warps=kind.num_warps, enable_fp_fusion=self._fp_fusion, **options
        )
