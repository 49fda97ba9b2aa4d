"""What pipelines choose by the numbers of a model's output: branches, and entries of tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LIMIT = 4.2


def by_their_mean(v: Tensor) -> Tensor:
    return torch.stack([row / (1 + row[row.abs() > 0.5].abs().mean()) for row in v])


def capped_in_a_list(c: Tensor, u: Tensor) -> Tensor:
    return torch.stack([a * (LIMIT / a.norm()) if a.norm() > LIMIT else a for a in u + 3.0 * (c - u)])


def capped(c: Tensor, u: Tensor) -> Tensor:
    rows = []
    for a, b in zip(c, u):
        mixed, limit = b + 3.0 * (a - b), a.norm() * 0.3 + 3.7
        size = mixed.norm()
        if size > limit:
            mixed = mixed * (limit / size)
        rows.append(mixed * 2)
    return torch.stack(rows)


def capped_in_place(c: Tensor, u: Tensor) -> Tensor:
    v = u + 3.0 * (c - u)
    for row in v:
        if row.abs().max() > 1.5:
            row *= 1.5 / row.abs().max()
    return v


def capped_by_index(c: Tensor, u: Tensor) -> Tensor:
    v = u + 3.0 * (c - u)
    for i in range(len(v)):
        if bool((v[i].norm() > LIMIT).item()):
            v[i] = v[i] * (LIMIT / v[i].norm())
    return v * 0.5


def either(c: Tensor, u: Tensor) -> Tensor:
    rows = []
    for a, b in zip(c, u):
        if (a - b).abs().max() > 0.55:
            row = b + 3.0 * (a - b)
        else:
            row = a.clamp(-0.3, 0.3)
        rows.append(row)
    return torch.stack(rows)


def scaled_in_two(c: Tensor, u: Tensor) -> Tensor:
    rows = []
    for row in u + 3.0 * (c - u):
        size = row.norm()
        if size > LIMIT:
            share = LIMIT / size
            row = row * share
        rows.append(row)
    return torch.stack(rows)


def returned(c: Tensor, u: Tensor) -> Tensor:
    def cap(row: Tensor) -> Tensor:
        size = row.norm()
        if size > LIMIT:
            return row * (LIMIT / size)
        return row.clone()

    v = u + 3.0 * (c - u)
    return torch.stack([0.75 * cap(row) + 0.25 * row for row in v])


# branches on the output, of which other weights take the other side
BRANCHES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "capped in a list": capped_in_a_list,
    "capped": capped,
    "capped in place": capped_in_place,
    "capped by index": capped_by_index,
    "either": either,
    "scaled in two": scaled_in_two,
    "returned": returned,
}


def chosen_rows(v: Tensor) -> Tensor:
    v = v.clone()
    v[v.norm(dim=(1, 2)) > LIMIT] *= 0.5
    return v


def rows_by_number(v: Tensor) -> Tensor:
    v = v.clone()
    for place in (v.norm(dim=(1, 2)) > LIMIT).nonzero().flatten():
        v[place] *= 0.5
    return v


def by_their_count(v: Tensor) -> Tensor:
    return torch.stack([row / (1 + len(row[row.abs() > 1.0])) for row in v])
