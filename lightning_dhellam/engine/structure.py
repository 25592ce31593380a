"""What a model was made of when its operators were made, which it must be made of still.

Operators hold the modules' parameters. A module or a parameter that is put in afterwards would be
evaluated by nothing and trained by nothing, without a word. Which parameters are frozen may change:
then other operators are made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import Module, Parameter


class _Part(NamedTuple):
    """The modules or the parameters that belong to a module.

    Attributes:
        prefix: of their names in the model.
        now: by name, as they are at any time.
        then: by name, as they were.
    """

    prefix: str
    now: dict[str, Any]
    then: dict[str, Any]


class Structure:
    """The modules and parameters of a model as they are now.

    Args:
        model: that is being lowered.
    """

    def __init__(self, model: Module) -> None:
        self._parts = [
            _Part(f"{name}." if name else "", own, dict(own))
            for name, module in model.named_modules()
            for own in (module._modules, module._parameters)
        ]
        self._forms = [
            (name, parameter, _form(parameter)) for name, parameter in model.named_parameters()
        ]
        self._trained = [parameter.requires_grad for parameter in model.parameters()]

    @property
    def changed(self) -> list[Parameter]:
        """The parameters that were frozen or unfrozen since. It waits for no device."""
        every = zip(self._forms, self._trained, strict=True)
        return [p for (_, p, _), trained in every if p.requires_grad is not trained]

    def freeze_as_then(self) -> None:
        """Let the same parameters require a gradient as then."""
        for (_, parameter, _), trained in zip(self._forms, self._trained, strict=True):
            parameter.requires_grad_(trained)

    def check(self) -> None:
        """Refuse a model that is made of something else by now. It waits for no device.

        Raises:
            ValueError: a module or a parameter was replaced, added or removed, or has another
                shape, type or device.
        """
        for prefix, now, then in self._parts:
            if len(now) != len(then) or any(now.get(key, self) is not then[key] for key in then):
                key = next(k for k in {**now, **then} if now.get(k, self) is not then.get(k, self))
                done = "replaced" if key in now and key in then else "added"
                raise ValueError(
                    f"'{prefix}{key}' was {done if key in now else 'removed'} after the model was"
                    " set up for training, which would go on without it: change layers in"
                    " build_model, and weights in place, as load_state_dict does"
                )
        for name, parameter, form in self._forms:
            if _form(parameter) != form:
                shape, dtype, device = form
                raise ValueError(
                    f"'{name}' of the model has become a tensor of shape {tuple(parameter.shape)},"
                    f" {parameter.dtype} on {parameter.device}, but was {tuple(shape)}, {dtype} on"
                    f" {device} when the model was set up: leave shape, type and device as they are"
                )


def _form(parameter: Parameter) -> tuple[torch.Size, torch.dtype, torch.device]:
    return parameter.shape, parameter.dtype, parameter.device
