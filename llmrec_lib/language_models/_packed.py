"""Linear layers that read a weight laid out once for the processor, where ``nn.Linear`` lays it out at every call."""

import torch
from torch import Tensor, nn


def pack_linears(model: nn.Module) -> None:
    """Make every plain ``nn.Linear`` of `model` use oneDNN with a packed weight in inference on a CPU, in place.

    The layer stays an ``nn.Linear`` with the same parameters, names and state dict, and gives the same values up to
    rounding. A weight is packed at the first call without gradients and again after it has changed (by an optimizer,
    ``load_state_dict`` or ``to``; writing through ``.data`` goes unnoticed); the packed copy takes the memory of the
    weight once more. Wherever it cannot be used (gradients, another device or dtype, no oneDNN in this torch) the layer
    is what it was.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = _PackedLinear


class _PackedLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        usable = (
            not torch.is_grad_enabled()
            and weight.device.type == input.device.type == "cpu"
            and weight.dtype == input.dtype
            and (weight.dtype == torch.float32 or weight.dtype == torch.bfloat16)
            and not weight.is_inference()  # these carry no version
            and input.numel() > 0
        )
        if not usable:
            return super().forward(input)
        version = (weight.data_ptr(), weight._version, weight.dtype)
        if self.__dict__.get("_packed_version") != version:
            self.__dict__["_packed"] = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
            self.__dict__["_packed_version"] = version
        return torch.ops.mkldnn._linear_pointwise(input, self.__dict__["_packed"], self.bias, "none", [], "")

    def __getstate__(self) -> dict:
        """A copy packs for itself: packed weights cannot be copied or pickled."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_packed")}
