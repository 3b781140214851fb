"""Adapters of low rank beside the matrices of a Transformer (LoRA): few weights are trained, few have to be shared."""

import torch
from torch import Tensor, nn

SCALE = 2.0  # alpha / rank of the paper


class LowRank(nn.Module):
    """A linear layer, left as it is, plus an update of low rank: ``base(x) + 2 B A x``; B is zero at first.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", with α = 2 `rank`.

    Parameters
    ----------
    base : nn.Linear or transformers' Conv1D (GPT-2), which keeps its weight transposed
    rank : rows of A.
    generator : of A's first values; torch's own by default.
    """

    def __init__(self, base: nn.Module, rank: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.base = base
        n_out, n_in = base.weight.shape if isinstance(base, nn.Linear) else base.weight.shape[::-1]
        self.a = nn.Parameter((torch.randn(rank, n_in, generator=generator) / n_in**0.5).to(base.weight.device))
        self.b = nn.Parameter(torch.zeros(n_out, rank, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + SCALE * (x @ self.a.T) @ self.b.T

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The base layer with the update added to its weight, in place."""
        update = SCALE * self.b @ self.a
        self.base.weight += update if isinstance(self.base, nn.Linear) else update.T
        return self.base


def matrices(module: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a Transformer's attention and MLP blocks, by their names in `module`."""
    from transformers.pytorch_utils import Conv1D

    return {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear | Conv1D)}


def add_low_rank(module: nn.Module, rank: int, generator: torch.Generator | None = None) -> list[nn.Parameter]:
    """Freeze a Transformer's blocks and put a `LowRank` in the place of each linear layer.

    Returns
    -------
    list of Parameter
        The adapters' A and B, all that is trained.

    Raises
    ------
    ValueError
        `rank` is below 1.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; an adapter needs at least 1")
    module.requires_grad_(False)
    adapters = {name: LowRank(base, rank, generator) for name, base in matrices(module).items()}
    for name, adapter in adapters.items():
        module.set_submodule(name, adapter)
    return [parameter for adapter in adapters.values() for parameter in (adapter.a, adapter.b)]


def merge_low_rank(model: nn.Module) -> nn.Module:
    """The same model, in place, with every adapter merged into the layer that it belongs to."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LowRank):
            model.set_submodule(name, module.merged())
    return model
