"""Stand-ins for pydantic and jaxtyping where they are not installed: options with their defaults, unchecked.

A machine that is lent for its GPU may have torch and transformers, and no way to get more. What is measured there is
the same: only the checks of options and shapes are missing.
"""

import importlib.machinery
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any, ClassVar


def install() -> list[str]:
    """Put a stand-in in place of each module that is missing; returns their names."""
    missing = [name for name in _CONTENTS if name not in sys.modules and importlib.util.find_spec(name) is None]
    for name in missing:
        module = types.ModuleType(name, "A stand-in.")
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(_CONTENTS[name])
        sys.modules[name] = module
    return missing


class _Default:
    """What `Field` makes: a default, or what makes one."""

    def __init__(self, default: Any = None, *, default_factory: Callable[[], Any] | None = None, **_: Any) -> None:
        self.default, self.factory = default, default_factory

    def make(self) -> Any:
        return self.factory() if self.factory else self.default


class _Model:
    """A class of options: its annotated attributes are fields."""

    model_fields: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, **_: Any) -> None:
        own = [inspect.get_annotations(base) for base in reversed(cls.__mro__) if base not in (_Model, object)]
        cls.model_fields = {name: getattr(cls, name, None) for names in own for name in names}

    def __init__(self, **given: Any) -> None:
        if unknown := given.keys() - self.model_fields.keys():
            raise TypeError(f"{type(self).__name__} has no {min(unknown)!r}")
        for name, default in self.model_fields.items():
            made = default.make() if isinstance(default, _Default) else default
            vars(self)[name] = given.get(name, made)

    def model_copy(self, *, update: dict[str, Any] | None = None) -> Any:
        return type(self)(**vars(self) | (update or {}))


class _Shaped:
    """An annotation of dtype and shape is its array type."""

    def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
        return item[0]


def _decorator(*_: Any, **__: Any) -> Callable[[Any], Any]:
    return lambda function: function


class _InvalidError(ValueError):
    """Never raised: nothing is checked."""


_CONTENTS: dict[str, dict[str, Any]] = {
    "pydantic": {
        "BaseModel": _Model, "Field": _Default, "ConfigDict": dict, "BeforeValidator": _decorator,
        "ValidationError": _InvalidError, "ValidationInfo": object, "SerializerFunctionWrapHandler": object,
        "field_validator": _decorator, "model_validator": _decorator, "model_serializer": _decorator,
        "NonNegativeFloat": float, "NonNegativeInt": int, "PositiveInt": int,
    },
    "pydantic_settings": {"BaseSettings": _Model, "SettingsConfigDict": dict},
    "jaxtyping": dict.fromkeys(("Bool", "Float", "Float32", "Float64", "Int", "Shaped"), _Shaped),
}  # fmt: skip
