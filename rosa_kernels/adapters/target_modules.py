"""Which modules of a model a config adapts."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rosa_kernels.config import LoRAConfig, RoSAConfig, check_expression, matches_end

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class TargetModule:
    """A module to adapt, its full name (the first of several), and the sizes of its adapter."""

    name: str
    module: Any  # an nn.Linear, an nn.Embedding or a module like them
    r: int
    lora_alpha: float
    density: float


def find_target_modules(model: nn.Module, config: LoRAConfig) -> list[TargetModule]:
    """The modules that the config adapts, in the order of model.named_modules().

    Raises:
        ValueError: a name or expression matches nothing (the message has the nearest names), a module that it matches
            cannot be adapted (the message has the reason), or nothing is left to adapt.
    """
    names = module_names(model)
    saved = saved_modules(model, config)
    excluded = _matching(names, config.exclude_modules, "exclude_modules")
    if config.target_modules == ALL_LINEAR:
        chosen = [name for name, module in names.items() if isinstance(module, nn.Linear)]
        chosen = [name for name in chosen if not _inside(name, saved)]
    else:
        chosen = _matching(names, config.target_modules, "target_modules")
        if isinstance(config.target_modules, str):
            chosen = [name for name in chosen if isinstance(names[name], (nn.Linear, nn.Embedding))]
    excluded_modules = {id(names[name]) for name in excluded}
    distinct: dict[int, str] = {}
    for name in chosen:
        if id(names[name]) not in excluded_modules:
            distinct.setdefault(id(names[name]), name)
    if not distinct:
        raise ValueError(f"target_modules: {config.target_modules!r} leaves no nn.Linear or nn.Embedding to adapt")
    targets = [_target_module(config, name, names[name]) for name in distinct.values()]
    saved_parameters = {id(p) for name in saved for p in names[name].parameters()}
    for target in targets:
        _check_adaptable(target, names, saved)
        if id(target.module.weight) in saved_parameters:
            raise ValueError(f"target_modules: {target.name} shares its weight with modules_to_save, which trains it")
    _check_overrides_used(config, targets)
    return targets


def module_names(model: nn.Module) -> dict[str, nn.Module]:
    """{full name: module}, without the model itself; a module reached by several names has them all."""
    return {name: module for name, module in model.named_modules(remove_duplicate=False) if name}


def saved_modules(model: nn.Module, config: LoRAConfig) -> list[str]:
    """The full names of the modules that config.modules_to_save means."""
    return _matching(module_names(model), config.modules_to_save, "modules_to_save")


def saved_module_tensors(root: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """{full name: tensor} of the parameters and persistent buffers of whole modules."""
    return {f"{name}.{key}": tensor for name in names for key, tensor in root.get_submodule(name).state_dict().items()}


def _target_module(config: LoRAConfig, name: str, module: nn.Module) -> TargetModule:
    density = config.density_of(name) if isinstance(config, RoSAConfig) else 0.0
    return TargetModule(name, module, config.r_of(name), config.lora_alpha_of(name), density)


def _matching(names: dict[str, nn.Module], wanted: str | tuple[str, ...], argument: str) -> list[str]:
    """The full names that a regular expression matches whole, or that equal or end in one of the listed names."""
    if isinstance(wanted, str):
        check_expression(argument, wanted)
        found = [name for name in names if re.fullmatch(wanted, name)]
        if not found:
            hint = f"; a list [{wanted!r}] would match the ends of names" if _ends(names, wanted) else ""
            raise ValueError(f"{argument}: the expression {wanted!r} matches no module's full name{hint}")
        return found
    for name in wanted:
        if not _ends(names, name):
            raise ValueError(f"{argument}: no module is called {name!r}{_near(names, name)}")
    return [name for name in names if any(_is_end(name, end) for end in wanted)]


def _is_end(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)


def _ends(names: Iterable[str], end: str) -> bool:
    return any(_is_end(name, end) for name in names)


def _near(names: Iterable[str], wanted: str) -> str:
    depth = wanted.count(".") + 1
    ends = sorted({".".join(name.split(".")[-depth:]) for name in names})
    near = difflib.get_close_matches(wanted, ends, n=5, cutoff=0.5)
    return f"; near it: {', '.join(near)}" if near else f"; there are: {', '.join(ends[:20])}"


def _inside(name: str, containers: list[str]) -> bool:
    return any(name == container or name.startswith(container + ".") for container in containers)


def _check_adaptable(target: TargetModule, names: dict[str, nn.Module], saved: list[str]) -> None:
    name, module = target.name, target.module
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        raise ValueError(f"target_modules: {name} is a {type(module).__name__}; only nn.Linear and nn.Embedding adapt")
    if isinstance(module, nn.Embedding) and type(module) is not nn.Embedding:
        raise ValueError(f"target_modules: {name} is a {type(module).__name__}, not exactly an nn.Embedding")
    if _inside(name, saved):
        raise ValueError(f"target_modules: {name} is inside modules_to_save, which trains whole")
    if target.r == 0 and target.density == 0:
        raise ValueError(f"target_modules: {name} has both r and density 0; exclude it instead")
    for other, alias in names.items():
        if alias is module:
            _check_parents(other, names)


def _check_parents(name: str, names: dict[str, nn.Module]) -> None:
    """Refuse a layer whose parent reads its weight and so would never run the adapter."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        parent = names[".".join(parts[:depth])]
        if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            raise ValueError(
                f"target_modules: {name} cannot be adapted: {type(parent).__name__} reads its weight directly and "
                f"would skip the adapter; exclude it by exclude_modules, or build that layer from nn.Linear calls"
            )


def _check_overrides_used(config: LoRAConfig, targets: list[TargetModule]) -> None:
    for field in ("rank_pattern", "alpha_pattern", "density_pattern"):
        for key in getattr(config, field, None) or ():
            if not any(matches_end(key, target.name) for target in targets):
                raise ValueError(f"{field}: {key!r} matches none of the adapted modules")
