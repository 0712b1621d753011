"""LoRAConfig and RoSAConfig: which layers of a model get an adapter, and of what size."""

import math
import numbers
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from rosa_kernels.pattern import STRUCTURES

MASK_METHODS = ("gradient", "fisher", "snip", "magnitude", "random")
MASK_SCOPES = ("layer", "global")


@dataclass(frozen=True)
class LoRAConfig:
    """Which modules get a low-rank adapter, scaling · B A (LoRA, arXiv 2106.09685), and of what size.

    The fields have the names and the meaning of those in PEFT's LoraConfig.

    Args:
        r: the rank, at least 1.
        lora_alpha: the numerator of scaling, which is lora_alpha / r.
        lora_dropout: the chance in [0, 1] that an element of the input is zeroed on its way to A, in training.
        target_modules: the modules to adapt. A list holds names, each a module's full name or the last dotted part or
            parts of it. A string is a regular expression that matches full names. "all-linear" means every nn.Linear,
            the output head too, unless modules_to_save or exclude_modules names it. An nn.Embedding is adapted only
            where a name or an expression matches it.
        exclude_modules: a list of names or a regular expression; a module that matches is not adapted.
        modules_to_save: a list of names of modules that train whole, for example a new classification head.
        use_rslora: scaling is lora_alpha / sqrt(r) (arXiv 2312.03732).
        rank_pattern, alpha_pattern: {name or regular expression: another r or lora_alpha}. An entry holds for the
            modules whose full name, or its end after a dot, it matches; the first match counts.

    Raises:
        ValueError: a number is out of its range, or an expression does not compile.
        TypeError: a field has the wrong Python type.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: str | tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None

    smallest_r = 1

    def __post_init__(self):
        check_integer("r", self.r, self.smallest_r)
        check_number("lora_alpha", self.lora_alpha)
        check_fraction("lora_dropout", self.lora_dropout)
        if not isinstance(self.use_rslora, bool):
            raise TypeError(f"use_rslora: expected True or False, got {self.use_rslora!r}")
        for name in ("target_modules", "exclude_modules"):
            self._normalise_names(name)
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"modules_to_save: expected a list of names, got the string {self.modules_to_save!r}")
        self._normalise_names("modules_to_save")
        if not self.target_modules:
            raise ValueError("target_modules: expected at least one name")
        self._normalise_numbers()
        self._check_pattern("rank_pattern", lambda key, r: check_integer(key, r, self.smallest_r))
        self._check_pattern("alpha_pattern", check_number)

    def _normalise_names(self, field: str) -> None:
        names = getattr(self, field)
        if isinstance(names, str):
            check_expression(field, names)
            return
        names = () if names is None else tuple(sorted(names) if isinstance(names, (set, frozenset)) else names)
        for name in names:
            if not isinstance(name, str) or not name:
                raise TypeError(f"{field}: expected names, got {name!r}")
        object.__setattr__(self, field, names)

    def _normalise_numbers(self) -> None:
        """NumPy's numbers become Python's, so that the config goes into JSON."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, dict):
                value = {key: _plain_number(number) for key, number in value.items()}
            object.__setattr__(self, field.name, _plain_number(value))

    def _check_pattern(self, field: str, check_value: Callable[[str, Any], None]) -> None:
        pattern = getattr(self, field)
        if pattern is None:
            return
        if not isinstance(pattern, dict):
            raise TypeError(f"{field}: expected a dict, got {type(pattern).__name__}")
        for key, value in pattern.items():
            check_expression(field, key)
            check_value(f"{field}[{key!r}]", value)

    def r_of(self, name: str) -> int:
        return self._override(self.rank_pattern, name, self.r)

    def lora_alpha_of(self, name: str) -> float:
        return self._override(self.alpha_pattern, name, self.lora_alpha)

    @staticmethod
    def _override(pattern: dict | None, name: str, default: Any) -> Any:
        matches = (value for key, value in (pattern or {}).items() if matches_end(key, name))
        return next(matches, default)

    def to_dict(self) -> dict:
        """Plain Python for JSON; config_from_dict reads it."""
        return {"adapter_type": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class RoSAConfig(LoRAConfig):
    """Which modules get a low-rank and a sparse adapter, scaling · B A + S (RoSA, arXiv 2401.04679), and of what size.

    All fields of LoRAConfig are fields here too, and its errors are raised here too.

    Args:
        r: the rank, at least 0; with 0 the adapter is sparse alone.
        density: the share in [0, 1] of a weight's entries that S holds; with 0 the adapter is low-rank alone.
        density_pattern: {name or regular expression: another density}, as rank_pattern.
        structure: what S consists of: single entries ("unstructured"), whole rows ("row"), whole columns ("column") or
            squares ("block"). On an nn.Embedding S always consists of whole rows, one a token.
        block_size: the side of a square.
        mask: the score by which select_masks picks the entries: the magnitude of the loss's gradient ("gradient"), the
            mean of its square ("fisher"), |gradient · weight| ("snip", arXiv 1810.02340), |weight| ("magnitude"), or
            chance ("random").
        mask_scope: with "layer" each layer has its own density; with "global" the entries of all linear layers compete
            for the same total.
        warmup_steps: how many steps a training loop should take with LoRA alone before it calls select_masks.
        mask_batches: how many batches select_masks reads at most.
    """

    density: float = 0.01
    density_pattern: dict[str, float] | None = None
    structure: str = "unstructured"
    block_size: int = 16
    mask: str = "gradient"
    mask_scope: str = "layer"
    warmup_steps: int = 64
    mask_batches: int = 8

    smallest_r = 0

    def __post_init__(self):
        super().__post_init__()
        check_fraction("density", self.density)
        self._check_pattern("density_pattern", check_fraction)
        check_choice("structure", self.structure, STRUCTURES)
        check_integer("block_size", self.block_size, 1)
        check_choice("mask", self.mask, MASK_METHODS)
        check_choice("mask_scope", self.mask_scope, MASK_SCOPES)
        check_integer("warmup_steps", self.warmup_steps, 0)
        check_integer("mask_batches", self.mask_batches, 1)
        if self.mask_scope == "global" and self.structure != "unstructured":
            raise ValueError(
                f"mask_scope: expected 'layer' with structure {self.structure!r}; 'global' compares single entries"
            )

    def density_of(self, name: str) -> float:
        return self._override(self.density_pattern, name, self.density)


def config_from_dict(fields_by_name: dict) -> LoRAConfig:
    """The config that to_dict wrote.

    Raises:
        ValueError: an unknown adapter_type or field, a missing field, or a value that the config refuses.
    """
    given = dict(fields_by_name)
    kinds = {kind.__name__: kind for kind in (LoRAConfig, RoSAConfig)}
    adapter_type = given.pop("adapter_type", None)
    check_choice("adapter_type", adapter_type, tuple(kinds))
    kind = kinds[adapter_type]
    expected = {field.name for field in fields(kind)}
    if set(given) != expected:
        raise ValueError(
            f"{adapter_type}: missing fields {sorted(expected - set(given))}, unknown {sorted(set(given) - expected)}"
        )
    try:
        return kind(**given)
    except TypeError as error:
        raise ValueError(f"{adapter_type}: {error}") from error


def _plain_number(value: Any) -> Any:
    if isinstance(value, (bool, str)) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def matches_end(expression: str, name: str) -> bool:
    """Whether the expression matches the whole of a dotted name, or what follows one of its dots."""
    return re.fullmatch(rf"(?:.*\.)?(?:{expression})", name) is not None


def check_expression(argument: str, expression: str) -> None:
    if not isinstance(expression, str):
        raise TypeError(f"{argument}: expected a string, got {expression!r}")
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(f"{argument}: {expression!r} is not a regular expression: {error}") from error


def check_integer(argument: str, value: Any, smallest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{argument}: expected an integer, got {value!r}")
    if value < smallest:
        raise ValueError(f"{argument}: expected at least {smallest}, got {value}")


def check_number(argument: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{argument}: expected a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{argument}: expected a finite number, got {value}")


def check_fraction(argument: str, value: Any) -> None:
    check_number(argument, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{argument}: expected a number in [0, 1], got {value}")


def check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
