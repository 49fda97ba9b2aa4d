"""What is known of torch's functions by their names."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten

# what is asked of a tensor besides its numbers
ASKED = frozenset(
    [
        "size", "dim", "stride", "numel", "nelement", "element_size", "ndimension", "storage_offset", "get_device",
        "is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_inference", "is_pinned", "is_shared",
        "is_same_size", "is_set_to", "is_conj", "is_neg", "type", "has_names", "__len__", "__hash__", "__repr__",
        "__str__", "__format__", "__dir__", "result_type", "can_cast", "promote_types", "untyped_storage", "data_ptr",
    ]
)  # fmt: skip
# new tensors of the size of another one, whose numbers do not matter
LIKE = frozenset(
    [
        "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like", "new_empty",
        "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty_strided", "new",
    ]
)  # fmt: skip
# take no more of a further tensor than its shape or dtype
AS = frozenset(
    [
        "to", "type_as", "expand_as", "view_as", "reshape_as", "broadcast_to",
    ]
)  # fmt: skip
# results whose size follows from numbers, and what tells a size
CHOOSE = frozenset(
    [
        "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount",
    ]
)  # fmt: skip
SIZES = frozenset(("shape", "size", "numel", "nelement", "__len__"))
# cut a tensor off its gradient, which here is the policy's
CUT = frozenset(("detach", "detach_", "data", "requires_grad_"))


def title(function: Any) -> str:
    """The name of a torch function; that of the attribute for one that is read."""
    name = getattr(function, "__name__", str(function))
    return getattr(getattr(function, "__self__", None), "__name__", name) if name == "__get__" else name


def tensors_in(result: Any) -> list[Any]:
    # torch.return_types are tuples that pytree does not open
    return tree_flatten(tuple(result) if isinstance(result, tuple) else result)[0]


def targets_of(name: str, args: Any, kwargs: Any) -> list[Tensor]:
    """Tensors that a function may write to, going by its name."""
    inplace = name.endswith("_") and not name.endswith("__") and name not in CUT
    augmented = name.startswith("__i") and name not in ("__invert__", "__index__", "__int__", "__iter__")
    if not (inplace or augmented or name == "__setitem__" or kwargs.get("inplace")):
        return []
    return [x for x in tree_flatten(args[:1] or tuple(kwargs.values())[:1])[0] if isinstance(x, Tensor)]
