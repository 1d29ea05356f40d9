"""Muon for the matrices of the layers, AdamW for everything else, as one optimizer.

Groups of parameters with a learning rate of each module enter; an optimizer that Trainer can schedule, save and load
leaves. The algorithms are torch's (`torch.optim.Muon`, Jordan 2024, arXiv 2502.16982; `torch.optim.AdamW`); which
parameters are trained is left to `trainer.py`.
"""

from __future__ import annotations

from typing import Any

import torch

# Muon's step has a spectral norm of 1, AdamW's has entries near 1: the same rate is far too small for it.
RATE_FACTOR = 16.0
ADAM_BETAS = (0.9, 0.98)


def is_muon_parameter(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter is a matrix of a layer: not an embedding, the head, the projector, a norm or a bias."""
    return parameter.ndim == 2 and ".layers." in name


class MuonWithAdamW(torch.optim.Optimizer):
    """Both optimizers behind one interface; `param_groups` are those of both, and schedulers may change them."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        """Makes the two optimizers.

        Args:
            groups: of parameters, with "lr" (AdamW's scale), "weight_decay" and "muon": whether Muon trains them.

        Raises:
            RuntimeError: when torch is older than 2.9, which brought Muon.
            ValueError: when a group for Muon holds other than matrices.
        """
        if not hasattr(torch.optim, "Muon"):
            raise RuntimeError(
                f"Expected torch 2.9 or newer for optimizer 'muon', got {torch.__version__}: update torch or set "
                "schedule.optimizer=adamw_torch."
            )
        muon = [{**group, "lr": group["lr"] * RATE_FACTOR} for group in groups if group["muon"]]
        adamw = [group for group in groups if not group["muon"]]
        self._parts: dict[str, torch.optim.Optimizer] = {}
        if muon:
            self._parts["muon"] = torch.optim.Muon(muon)
        if adamw:
            self._parts["adamw"] = torch.optim.AdamW(adamw, betas=ADAM_BETAS)
        super().__init__([group for part in self._parts.values() for group in part.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        # The same dictionaries, so that a rate set here is the rate there.
        self.param_groups = [group for part in self._parts.values() for group in part.param_groups]

    def step(self, closure: Any = None) -> Any:
        """One step of each.

        Args:
            closure: computes the loss anew; called once.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts.values():
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state of each, by its name."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of each.

        Args:
            state_dict: of an optimizer with the same groups.
        """
        for name, part in self._parts.items():
            part.load_state_dict(state_dict[name])
        self._share_groups()
