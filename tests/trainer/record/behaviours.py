"""A pipeline that does one odd thing at a time between model and scheduler, and what odd things there are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from numbers_chosen import BRANCHES, by_their_count, by_their_mean, chosen_rows, rows_by_number
from torch import Tensor, nn

ROWS, TOKENS, WIDTH, STEPS = 4, 5, 8, (0, 1, 2)


class Net(nn.Module):
    """Tokens ``[B, L, C]``, a time and a condition per row; ``mode`` is what is odd about it."""

    def __init__(self, mode: str = "", inner: nn.Module | None = None):
        super().__init__()
        self.inp = nn.Linear(WIDTH, 16) if inner is None else inner
        self.time, self.cond, self.out = nn.Linear(1, 16), nn.Linear(6, 16), nn.Linear(16, WIDTH)
        self.mode = mode

    def forward(self, x: Tensor, timestep: Tensor, c: Tensor, extra: Any = None, residual: Any = None) -> Any:
        if self.mode == "edits its input":
            x.mul_(0.5).add_(0.1)
        scale = extra.pop("scale") if self.mode == "pops" else 1.0
        if self.mode == "layers first":
            c = c.mean(0)
        if self.mode == "rows apart":
            c = c.view(len(x), 2, -1).mean(1)
        if self.mode == "batches apart":
            c = c.view(2, len(x), -1)[0] - 2 * c.view(2, len(x), -1)[1]
        if self.mode == "table":
            scale = 1 + extra.mean(0).sum()
        if self.mode == "list of tables":
            scale = 1 + sum(number * table.mean() for number, table in enumerate(extra))
        hidden = self.inp(x) + self.time(timestep.view(-1, 1, 1).to(x) / 1000) + self.cond(c)[:, None] * scale
        if residual is not None:
            for one in residual if isinstance(residual, (list, tuple)) else [residual]:
                hidden = hidden + one
        hidden = torch.tanh(hidden)
        given = self.out(hidden)
        if self.mode == "list":
            return (list(given),)
        if self.mode == "batch second":
            return (given.transpose(0, 1),)
        if self.mode == "mixes rows":
            return (given - 0.1 * given.mean(0, keepdim=True),)
        return {"dict": {"sample": given}, "last": (hidden, given), "tensor": given, "hidden": hidden}.get(
            self.mode, (given,)
        )


class Odd(DiffusionPipeline):
    """``combine(pipeline, c, u, x, t, i)`` makes the velocity of two outputs; ``call`` makes these."""

    def __init__(
        self, transformer: nn.Module, controlnet: nn.Module, refiner: nn.Module,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ):  # fmt: skip
        super().__init__()
        self.register_modules(transformer=transformer, controlnet=controlnet, refiner=refiner, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, combine: Callable[..., Tensor], call: Callable[..., Any] | None = None, rows: int = ROWS,
        states: Sequence[Tensor] | None = None, dtype: torch.dtype = torch.float32,
    ) -> list[Tensor]:  # fmt: skip
        g = torch.Generator().manual_seed(0)
        c, u = (torch.randn(rows, 6, generator=g).to(dtype) for _ in range(2))
        x = torch.randn(rows, TOKENS, WIDTH, generator=g).to(dtype)
        self.state: Any = None
        self.scheduler.set_timesteps(6)
        seen = [x]
        for i, t in enumerate(self.scheduler.timesteps):
            if call is None:
                outputs = [value_of(self.transformer(x, t.expand(rows), one)) for one in (c, u)]
            else:
                outputs = call(self, x, t.expand(rows), c, u)
            x = self.scheduler.step(combine(self, *outputs, x, t, i), t, x, return_dict=False)[0].to(dtype)
            x = x if states is None else states[i + 1]
            seen.append(x)
        return seen


def value_of(output: Any) -> Any:
    output = output["sample"] if isinstance(output, dict) else output if isinstance(output, Tensor) else output[-1]
    return torch.stack(output) if isinstance(output, list) else output


def guided(p: Any, c: Tensor, u: Tensor, x: Tensor, t: Tensor, i: int) -> Tensor:
    return u + 3.0 * (c - u)


def of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A combination that looks at the two outputs only."""
    return lambda p, c, u, x, t, i: function(c, u)


def after(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A combination that does something to the guided velocity."""
    return lambda p, c, u, x, t, i: function(u + 3.0 * (c - u))


def norm(v: Tensor, *dims: int) -> Tensor:
    return torch.linalg.vector_norm(v, dim=dims, keepdim=True)


def momentum(p: Any, c: Tensor, u: Tensor, x: Tensor, t: Tensor, i: int) -> Tensor:
    delta = c - u
    p.state = delta if p.state is None else delta - 0.5 * p.state
    return u + 3.0 * p.state


def early_momentum(p: Any, c: Tensor, u: Tensor, x: Tensor, t: Tensor, i: int) -> Tensor:
    """Guidance in the first step alone, whose momentum goes on."""
    if i == 0:
        p.state = c - u
        return u + 3.0 * p.state
    p.state = 0.5 * p.state
    return c + p.state


def apg(p: Any, c: Tensor, u: Tensor, x: Tensor, t: Tensor, i: int) -> Tensor:
    delta = (c - u).double()
    delta = delta * torch.minimum(torch.ones_like(norm(delta, 1, 2)), 2.0 / norm(delta, 1, 2))
    unit = F.normalize(c.double(), dim=(1, 2))
    along = (delta * unit).sum((1, 2), keepdim=True) * unit
    return c + 2.0 * (delta - along + 0.3 * along).to(c.dtype)


def zero_star(c: Tensor, u: Tensor) -> Tensor:
    flat, other = c.flatten(1).float(), u.flatten(1).float()
    alpha = (flat * other).sum(1, keepdim=True) / (other.square().sum(1, keepdim=True) + 1e-8)
    u = u * alpha.view(-1, 1, 1).to(u.dtype)
    return u + 3.0 * (c - u)


def tangential(c: Tensor, u: Tensor) -> Tensor:
    both = torch.stack([c, u], dim=1).flatten(2).float()
    _, _, directions = torch.linalg.svd(both, full_matrices=False)
    first = directions[:, :1]
    part = (both[:, 1:] @ first.transpose(1, 2)) @ first
    return c + 2.0 * (c - part.view_as(c).to(c.dtype))


def in_place(c: Tensor, u: Tensor) -> Tensor:
    c.sub_(u).mul_(3.0).add_(u)
    return c


def chunks_in_place(c: Tensor, u: Tensor) -> Tensor:
    first, second = torch.cat([u, c]).chunk(2)
    second -= first
    first += second * 3.0
    first.div_(norm(first, -1) + 0.5)
    return first


def channels(c: Tensor, u: Tensor) -> Tensor:
    half = u[..., :4] + 3.0 * (c[..., :4] - u[..., :4])
    return torch.cat([half, c[..., 4:]], dim=-1)


def filled(c: Tensor, u: Tensor) -> Tensor:
    made = torch.empty_like(c)
    made[..., :4] = c[..., :4]
    made[..., 4:] = u[..., 4:] * 2
    made[:, 0] = 0.25
    return made


def buffered(c: Tensor, u: Tensor) -> Tensor:
    buffer = torch.zeros(2, *c.shape, dtype=c.dtype)
    front = buffer[0]
    front.copy_(c)
    buffer[1] = u
    buffer.mul_(2.0)
    first, second = buffer.unbind(0)
    return second + 1.5 * (first - second)


def out_argument(c: Tensor, u: Tensor) -> Tensor:
    made = torch.empty(0, dtype=c.dtype)
    torch.sub(c, u, out=made)
    torch.mul(made, 3.0, out=made)
    return torch.add(made, u, out=torch.empty_like(u))


def row_by_row(c: Tensor, u: Tensor) -> Tensor:
    return torch.stack([b + 3.0 * (a - b) / a.norm() for a, b in zip(c, u)])


def threshold(v: Tensor) -> Tensor:
    bound = v.float().abs().flatten(1).quantile(0.9, dim=1)[:, None, None].to(v.dtype)
    return v.clamp(-bound, bound) / bound


def masked(v: Tensor) -> Tensor:
    mask = torch.zeros(1, TOKENS, 1, dtype=v.dtype)
    mask[:, :2] = 1
    return v * (1 - mask) + 0.1 * mask


def assigned(v: Tensor) -> Tensor:
    v[v.abs() < 0.2] = 0.0
    return v


def detached(c: Tensor, u: Tensor) -> Tensor:
    return u.detach() + 3.0 * (c.data - u.clone().detach())


def turned(v: Tensor) -> Tensor:
    v = v.reshape(len(v), TOKENS, 2, 4).permute(0, 3, 1, 2).unsqueeze_(1)
    v.mul_(2.0)
    return v.squeeze(1).permute(0, 2, 3, 1).flatten(2)


def noised(p: Any, c: Tensor, u: Tensor, x: Tensor, t: Tensor, i: int) -> Tensor:
    g = torch.Generator().manual_seed(i)
    return c + 0.1 * torch.randn(c.shape, generator=g).to(c.dtype) + 0.1 * torch.randn_like(u)


def x0(p: Any, c: Tensor, u: Tensor, x: Tensor, t: Tensor, i: int) -> Tensor:
    sigma = p.scheduler.sigmas[i].to(x.dtype)
    clean = (x - sigma * (u + 3.0 * (c - u))).clamp(-1, 1)
    return (x - clean) / sigma.clamp(min=0.05)


def pixel(p: Any, c: Tensor, u: Tensor, x: Tensor, t: Tensor, i: int) -> Tensor:
    return (x.float() - guided(p, c, u, x, t, i).float()) / max(float(t) / 1000, 0.05)


def blended(p: Any, c: Tensor, u: Tensor, x: Tensor, t: Tensor, i: int) -> Tensor:
    v = guided(p, c, u, x, t, i)
    held = torch.arange(TOKENS)[None, :, None] < 2
    return torch.where(held, x, v)


@torch.jit.script
def scripted(value: Tensor) -> Tensor:
    return value * 2.0 + 1.0


class Stopped(torch.autograd.Function):
    """As compiled and fused helpers are."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value * 2.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2.0


def doubled(order: Sequence[int]) -> Callable[..., Any]:
    def call(p: Any, x: Tensor, t: Tensor, c: Tensor, u: Tensor) -> list[Tensor]:
        both = value_of(p.transformer(torch.cat([x, x]), torch.cat([t, t]), torch.cat([(c, u)[i] for i in order])))
        return [both.chunk(2)[order.index(i)] for i in range(2)]

    return call


def with_condition(change: Callable[[Tensor], Any]) -> Callable[..., Any]:
    return lambda p, x, t, c, u: [value_of(p.transformer(x, t, change(one))) for one in (c, u)]


def one_call_later(p: Any, x: Tensor, t: Tensor, c: Tensor, u: Tensor) -> list[Tensor]:
    """Two calls in the first step, and one in the others."""
    first = value_of(p.transformer(x, t, c))
    return [first, value_of(p.transformer(x, t, u)) if p.state is None else first]


def reused(p: Any, x: Tensor, t: Tensor, c: Tensor, u: Tensor) -> list[Tensor]:
    buffer, outputs = torch.empty_like(c), []
    for one in (c, u):
        buffer.copy_(one)
        outputs.append(value_of(p.transformer(x, t, buffer)))
    return outputs


def controlled(p: Any, x: Tensor, t: Tensor, c: Tensor, u: Tensor) -> list[Tensor]:
    residuals = [value_of(p.controlnet(x, t, c)) * 0.5 for _ in range(2)]
    return [value_of(p.transformer(x, t, one, None, residuals)) for one in (c, u)]


def second(p: Any, x: Tensor, t: Tensor, c: Tensor, u: Tensor) -> list[Tensor]:
    first = value_of(p.transformer(x, t, c))
    return [first, value_of(p.refiner(x + 0.5 * first, t, u))]


def before_the_loop(p: Any, x: Tensor, t: Tensor, c: Tensor, u: Tensor) -> list[Tensor]:
    if p.state is None:
        p.state = value_of(p.transformer(x[:1], torch.zeros(1), c[:1])).detach()
    return [value_of(p.transformer(x, t, one)) + 0.1 * p.state for one in (c, u)]


def directly(p: Any, x: Tensor, t: Tensor, c: Tensor, u: Tensor) -> list[Tensor]:
    return [value_of(p.transformer.forward(x, t, one)) for one in (c, u)]


def part_of_it(p: Any, x: Tensor, t: Tensor, c: Tensor, u: Tensor) -> list[Tensor]:
    hidden = p.transformer(x, t, c)
    return [p.transformer.out(hidden), p.transformer.out(hidden * 0.5)]


def in_autocast(p: Any, x: Tensor, t: Tensor, c: Tensor, u: Tensor) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        return [value_of(p.transformer(x, t, one)).to(x.dtype) for one in (c, u)]


def hooked(p: Any, x: Tensor, t: Tensor, c: Tensor, u: Tensor) -> list[Tensor]:
    outputs = [value_of(p.transformer(x, t, c))]
    own = p.transformer.inp.forward
    p.transformer.inp.forward = lambda value: own(value) * 0.5
    outputs.append(value_of(p.transformer(x, t, u)))
    del p.transformer.inp.forward
    return outputs


# combination, calls, what is odd about the net
RIGHT: dict[str, tuple[Callable[..., Tensor], Callable[..., Any] | None, str]] = {
    "plain": (of(lambda c, u: c), None, ""),
    "guidance": (guided, None, ""),
    "double batch": (guided, doubled([1, 0]), ""),
    "double batch, condition first": (guided, doubled([0, 1]), ""),
    "scale per step": (lambda p, c, u, x, t, i: u + (2 + i) * (c - u), None, ""),
    "scale from the time": (lambda p, c, u, x, t, i: u + (1 + torch.cos(t / 1000)).to(c) * (c - u), None, ""),
    "scale per row": (of(lambda c, u: u + torch.linspace(2, 5, len(c)).view(-1, 1, 1).to(c) * (c - u)), None, ""),
    "scale per token": (of(lambda c, u: u + torch.linspace(2, 5, TOKENS)[:, None].to(c) * (c - u)), None, ""),
    "interval": (lambda p, c, u, x, t, i: guided(p, c, u, x, t, i) if i == 1 else c, None, ""),
    "zero at first": (lambda p, c, u, x, t, i: c * 0 if i == 0 else c, None, ""),
    "momentum": (momentum, None, ""),
    "adaptive projected guidance": (apg, None, ""),
    "zero star": (of(zero_star), None, ""),
    "tangential": (of(tangential), None, ""),
    "clamp": (after(lambda v: v.clamp(-0.5, 0.5)), None, ""),
    "clamp in place": (after(lambda v: v.clamp_(min=-0.3)), None, ""),
    "dynamic threshold": (after(threshold), None, ""),
    "norm over the tokens": (after(lambda v: v / norm(v, 1)), None, ""),
    "norm over all": (after(lambda v: v / norm(v, 1, 2)), None, ""),
    "norm over channels, like the first": (of(lambda c, u: (2 * c - u) * norm(c, 2) / norm(2 * c - u, 2)), None, ""),
    "standard deviation": (after(lambda v: v / v.std(dim=(1, 2), keepdim=True)), None, ""),
    "softmax": (after(lambda v: v.softmax(-1)), None, ""),
    "sorted": (after(lambda v: v.sort(dim=-1).values + v.topk(2, dim=-1)[0].sum(-1, keepdim=True)), None, ""),
    "mask": (after(masked), None, ""),
    "mean of large ones": (after(by_their_mean), None, ""),
    "masked assignment": (after(assigned), None, ""),
    "part of the channels": (of(channels), None, ""),
    "part of the tokens": (of(lambda c, u: torch.cat([c[:, :2], (2 * c - u)[:, 2:]], 1)), None, ""),
    "filled in": (of(filled), None, ""),
    "in a buffer": (of(buffered), None, ""),
    "in place": (of(in_place), None, ""),
    "chunks in place": (of(chunks_in_place), None, ""),
    "out arguments": (of(out_argument), None, ""),
    "row by row": (of(row_by_row), None, ""),
    "turned": (after(turned), None, ""),
    "detached": (of(detached), None, ""),
    "float64": (of(lambda c, u: (u.double() + 3.0 * (c.double() - u.double())).to(c.dtype)), None, ""),
    "through bfloat16": (after(lambda v: v.bfloat16().to(v.dtype) * 1.5), None, ""),
    "fourier": (after(lambda v: torch.fft.ifft(torch.fft.fft(v.float(), dim=1) * 0.5, dim=1).real.to(v)), None, ""),
    "scripted": (after(scripted), None, ""),
    "scripted in between": (of(lambda c, u: u + scripted(c - u)), None, ""),
    "branch that stays": (after(lambda v: v * 0.5 if v.abs().max() > 1e-3 else v), None, ""),
    "fresh noise": (noised, None, ""),
    "clean image": (x0, None, ""),
    "pixels": (pixel, None, ""),
    "blended with the state": (blended, None, ""),
    "function with a backward": (after(Stopped.apply), None, ""),
    "dict": (guided, None, "dict"),
    "tensor": (guided, None, "tensor"),
    "last of several": (guided, None, "last"),
    "list of rows": (guided, None, "list"),
    "batch second": (of(lambda c, u: (u + 3.0 * (c - u)).transpose(0, 1)), None, "batch second"),
    "edits its input": (
        guided, lambda p, x, t, c, u: [value_of(p.transformer(x.clone(), t, one)) for one in (c, u)], "edits its input",
    ),
    "pops": (
        guided, lambda p, x, t, c, u: [value_of(p.transformer(x, t, one, {"scale": 2.0})) for one in (c, u)], "pops",
    ),
    "layers first": (guided, with_condition(lambda c: torch.stack([c, 2 * c, 3 * c])), "layers first"),
    "as many layers as rows": (guided, with_condition(lambda c: torch.stack([c, 2 * c, 3 * c, -c])), "layers first"),
    "two per row": (guided, with_condition(lambda c: torch.stack([c, c.square()], 1).flatten(0, 1)), "rows apart"),
    "two batches": (guided, with_condition(lambda c: torch.cat([c, c.square()])), "batches apart"),
    "table": (
        guided,
        lambda p, x, t, c, u: [value_of(p.transformer(x, t, e, torch.arange(12.0).view(4, 3))) for e in (c, u)],
        "table",
    ),
    "list of tables": (
        guided,
        lambda p, x, t, c, u: [
            value_of(p.transformer(x, t, one, [torch.arange(3.0) + k for k in range(4)])) for one in (c, u)
        ],
        "list of tables",
    ),
    "buffer used twice": (guided, reused, ""),
    "control net that shares layers": (guided, controlled, ""),
    "second denoiser": (guided, second, ""),
    "forward called directly": (guided, directly, ""),
    "head called by the pipeline": (guided, part_of_it, "hidden"),
    "autocast": (guided, in_autocast, ""),
    "momentum of an interval": (early_momentum, one_call_later, ""),
    "replaced layer": (guided, hooked, ""),
    **{name: (of(function), None, "") for name, function in BRANCHES.items()},
}  # fmt: skip


# what stops with these words
REFUSED: dict[str, tuple[Callable[..., Tensor], Callable[..., Any] | None, str, str]] = {
    "numbers": (after(lambda v: v / float(v.float().std())), None, "", "__float__ took numbers out of a tensor"),
    "item": (after(lambda v: v / v.float().std().item()), None, "", "item took numbers out of a tensor"),
    "list of numbers": (after(lambda v: torch.tensor(v.tolist(), dtype=v.dtype)), None, "", "tolist took numbers"),
    "numpy": (
        after(lambda v: torch.from_numpy(v.float().numpy() * 2).to(v.dtype)), None, "", "numpy took numbers out of",
    ),
    "rows are centred": (after(lambda v: v - 0.01 * v.mean(0)), None, "", "depends on the other rows of its batch"),
    "rows are normed together": (after(lambda v: v / v.norm()), None, "", "depends on the other rows of its batch"),
    "model mixes rows": (guided, None, "mixes rows", "none of the ways to take some of the rows"),
    "dropout": (after(lambda v: F.dropout(v, 0.3)), None, "", "give another velocity"),
    "noise on the output": (after(lambda v: v + v.clone().normal_()), None, "", "give another velocity"),
    "chosen rows": (after(chosen_rows), None, "", "what it chose by numbers .* has size"),
    "rows by number": (after(rows_by_number), None, "", "what it chose by numbers .* has size"),
    "how many are large": (after(by_their_count), None, "", "what it chose by numbers .* has size"),
    "before the loop": (guided, before_the_loop, "", "before the loop"),
}  # fmt: skip


def build(mode: str, dtype: torch.dtype) -> Odd:
    torch.manual_seed(0)
    net = Net(mode)
    control = Net("hidden", net.inp)
    pipeline = Odd(net, control, Net(), FlowMatchEulerDiscreteScheduler(shift=3.0))
    for module in (net, control, pipeline.refiner):
        module.to(dtype)
    return pipeline


@contextlib.contextmanager
def moved(pipeline: Odd, size: float = 0.02):
    """Within this context all weights are a little different."""
    parameters = {p for m in pipeline.components.values() if isinstance(m, nn.Module) for p in m.parameters()}
    before = {p: p.detach().clone() for p in parameters}
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in sorted(parameters, key=lambda p: (p.shape, float(p.float().sum()))):
            p += size * torch.randn(p.shape, generator=generator).to(p.dtype)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in before.items():
                p.copy_(value)
