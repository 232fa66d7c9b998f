"""Mixed precision by hand: a bfloat16 copy computes, float32 weights are kept and updated.

Knows weights and gradients only; the learning rate comes with each step.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

_CLIP = 1.0


class Optimiser:
    """`compute` is the copy to run, Any because transformers has no types; `module` holds the exact weights."""

    compute: Any

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module.to(device)
        self.compute = copy.deepcopy(module).to(torch.bfloat16)
        self._pairs = list(zip(self.module.parameters(), self.compute.parameters(), strict=True))
        groups = [
            {"params": [weight], "weight_decay": 0.03 if weight.dim() > 1 and "embed_tokens" not in name else 0.0}
            for name, weight in self.module.named_parameters()
        ]
        self._adam = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)

    def step(self, loss: Tensor, learning_rate: float) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        for exact, copied in self._pairs:
            exact.grad, copied.grad = None if copied.grad is None else copied.grad.float(), None
        nn.utils.clip_grad_norm_([exact for exact, _ in self._pairs], _CLIP)
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._adam.step()
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the exact weights into the computing copy."""
        torch._foreach_copy_([copied for _, copied in self._pairs], [exact for exact, _ in self._pairs])

    def state(self) -> dict[str, Any]:
        return {"module": self.module.state_dict(), "adam": self._adam.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self._adam.load_state_dict(state["adam"])
        self.refresh()
