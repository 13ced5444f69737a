"""FLOPs and activation memory of torch code, counted on the meta device: nothing is computed, nothing allocated."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

LOW_PRECISION = (F.linear, F.conv2d, F.scaled_dot_product_attention)  # what autocast runs in bfloat16
NORMS = (F.layer_norm, F.group_norm, F.rms_norm)  # what autocast runs in float32


@dataclass(frozen=True)
class Reading:
    """What one call cost."""

    flops: int  # 2 a multiply-add of matrix products, convolutions and attention; all else is left out
    activation_bytes: int  # tensors kept for the backward pass, each storage once, without parameters
    weight_copy_bytes: int  # bfloat16 copies of parameters kept for the backward pass


class GpuKernels(TorchFunctionMode):
    """Makes meta tensors follow what torch does on a GPU: autocast's data types, and fused kernels.

    Meta has no autocast (of torch 2.13) and takes attention, RMS norm and dropout apart into pieces that no GPU stores.
    """

    def __init__(self, bf16: bool) -> None:
        super().__init__()
        self.bf16 = bf16
        self.copies: dict[Tensor, Tensor] = {}  # bfloat16 of each parameter, made once as autocast does

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if self.bf16 and func in LOW_PRECISION + NORMS:
            cast = self._low if func in LOW_PRECISION else _float32
            args, given = tuple(map(cast, args)), {name: cast(value) for name, value in given.items()}
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args, **given)[0]
        if func is F.rms_norm:  # keeps what the fused RMS norm keeps, and a mean
            return F.layer_norm(*args, **given)
        if func is F.dropout and given["training"] and given["p"] > 0.0:
            return torch.native_dropout(args[0], given["p"], True)[0]  # keeps one byte a value
        return func(*args, **given)

    def _low(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(torch.bfloat16)
        if value not in self.copies:
            self.copies[value] = value.to(torch.bfloat16)
        return self.copies[value]


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


def read(call: Callable[[], Tensor], parameters: Iterable[Tensor], *, bf16: bool, backward: bool) -> Reading:
    """Run `call`, and the backward pass of the scalar it returns, on meta tensors; `parameters` are no activations."""
    kept: dict[int, int] = {}  # storage -> bytes; the graph keeps all of them alive until `backward`

    def keep(tensor: Tensor) -> Tensor:
        kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    kernels = GpuKernels(bf16)
    with FlopCounterMode(display=False) as counter, kernels, torch.set_grad_enabled(backward):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = call()
        copies = sum(kept.pop(_storage(copy), 0) for copy in kernels.copies.values())
        for parameter in parameters:
            kept.pop(_storage(parameter), None)
        if backward:
            result.backward()
    return Reading(counter.get_total_flops(), sum(kept.values()), copies)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
