"""LayerConfig: what the config classes of `adapterx.quant.configs` have in common, and how they are added.

These classes are Neural Compressor's by name, field and default, so that its users find what they know: mutable, with
``set_local``, dicts, JSON and addition. Nothing behind them is: each gives one frozen method (`LayerConfig.method`).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, dataclass_transform

from torch import nn

from adapterx.atomic import atomic_write
from adapterx.errors import OptionError, nearest
from adapterx.quant.config_fields import Rule, option
from adapterx.quant.linear import is_linear

Key = str | type[nn.Module]
GLOBAL, LOCAL = "global", "local"


@dataclass_transform(field_specifiers=(option,))
class LayerConfig:
    """What is done to the layers of a model: one method for all, and others for some (`set_local`).

    A list where one value is expected stands for one config a value, for `adapterx.quant.autotune`.
    """

    name: ClassVar[str] = ""
    priority: ClassVar[int] = 0
    fields: ClassVar[Mapping[str, Rule]] = {}
    white_list: Any
    locals: ClassVar[list[tuple[Key, LayerConfig]]]

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(eq=False, repr=False)(cls)
        cls.fields = {field.name: field.metadata["rule"] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        assign = cls.__init__

        @functools.wraps(assign)
        def checked(self: LayerConfig, *args: Any, **kwargs: Any) -> None:
            if len(args) > len(cls.fields):
                raise OptionError(f"{cls.__name__} has {len(cls.fields)} fields, {len(args)} values given")
            self._check({**dict(zip(cls.fields, args, strict=False)), **kwargs})
            object.__setattr__(self, "locals", [])
            assign(self, *args, **kwargs)

        cls.__init__ = checked  # type: ignore[assignment]

    def method(self) -> Any:
        """The frozen method that this asks for, or None for a layer that stays float."""
        raise NotImplementedError

    def takes(self, module: nn.Module) -> bool:
        """Whether the method is one for layers like ``module``."""
        return is_linear(module)

    def leaves(self, name: str, module: nn.Module) -> bool:
        """Whether the fields keep the module of that name in float."""
        return False

    def set_local(self, operator_name_or_list: Key | Sequence[Key], config: LayerConfig) -> Self:
        """Have ``config`` for the layers of that name (a regular expression, from the name's start) or class.

        A string that is the name of a module class in the model ("Linear", "Conv1D") means the class. Names win over
        classes, and classes over the rest; among equals the one set last.

        Raises:
            OptionError: not a name, class, or list of these; what matches no module is an error of `prepare`
        """
        several = isinstance(operator_name_or_list, list | tuple)
        for key in operator_name_or_list if several else [operator_name_or_list]:  # type: ignore[union-attr]
            if not isinstance(key, str) and not (isinstance(key, type) and issubclass(key, nn.Module)):
                raise OptionError(f"set_local({key!r}, ...): expected a module's name, a regular expression or a class")
            if not isinstance(config, LayerConfig):
                raise OptionError(f"set_local({key!r}, {config!r}): expected a config, such as RTNConfig(bits=8)")
            self.locals[:] = [kept for kept in self.locals if kept[0] != key]
            self.locals.append((key, config))
        return self

    def values(self) -> dict[str, Any]:
        """The fields of the global config by name."""
        return {name: getattr(self, name) for name in self.fields}

    def expand(self) -> list[Self]:
        """One config for each combination of the values in lists; those of later fields vary fastest."""
        names = [n for n, rule in self.fields.items() if not rule.listed and isinstance(getattr(self, n), list)]
        found = []
        for chosen in itertools.product(*(getattr(self, name) for name in names)):
            one = copy.deepcopy(self)
            for name, value in zip(names, chosen, strict=True):
                setattr(one, name, value)
            found.append(one)
        return found

    def to_dict(self) -> dict[str, Any]:
        """The fields; with locals, ``{"global": fields, "local": {key: fields}}``."""
        fields = {name: _plain(value) for name, value in self.values().items()}
        if not self.locals:
            return fields
        return {GLOBAL: fields, LOCAL: {_key_text(key): self._local_dict(config) for key, config in self.locals}}

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> Self:
        """What `to_dict` gave. Fields that are missing have their defaults.

        Raises:
            OptionError: unknown fields, or values that are not implemented
        """
        if GLOBAL not in config_dict and LOCAL not in config_dict:
            return cls(**config_dict)
        unknown = [key for key in config_dict if key not in (GLOBAL, LOCAL)]
        if unknown:
            raise OptionError(f"{cls.__name__}: {', '.join(map(repr, unknown))} beside 'global' and 'local'")
        config = cls(**config_dict.get(GLOBAL, {}))
        for key, fields in config_dict.get(LOCAL, {}).items():
            config.set_local(key, cls._local_from(fields))
        return config

    def to_json_string(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_json_file(self, filename: str | Path) -> None:
        """Write `to_json_string` to a file."""
        atomic_write(filename, self.to_json_string().encode())

    @classmethod
    def from_json_file(cls, filename: str | Path) -> Self:
        """Read what `to_json_file` wrote."""
        return cls.from_dict(json.loads(Path(filename).read_text()))

    def problems(self) -> list[str]:
        """What is wrong between fields, each fine by itself."""
        return [
            f"{name}={value!r} is a list of trials for autotune; give one value"
            for name, value in self.values().items()
            if isinstance(value, list) and not self.fields[name].listed
        ]

    def __add__(self, other: LayerConfig | ComposedConfig) -> LayerConfig | ComposedConfig:
        if isinstance(other, ComposedConfig):
            return ComposedConfig([self]) + other
        return _merged(self, other) if type(self) is type(other) else ComposedConfig([self, other])

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __setattr__(self, name: str, value: Any) -> None:
        self._check({name: value})
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        defaults = type(self)()
        shown = [f"{name}={value!r}" for name, value in self.values().items() if getattr(defaults, name) != value]
        local = [f".set_local({_key_text(key)!r}, {config!r})" for key, config in self.locals]
        return f"{type(self).__name__}({', '.join(shown)}){''.join(local)}"

    def _check(self, given: Mapping[str, Any]) -> None:
        faults = []
        for name, value in given.items():
            rule = self.fields.get(name)
            if rule is None:
                faults.append(f"no field {name!r}{nearest(name, self.fields)}")
                continue
            several = isinstance(value, list) and not rule.listed
            wrong = [item for item in (value if several else [value]) if not rule.holds(item)]
            if wrong or (several and not value):
                faults.append(f"{name}={value!r} is not implemented; expected {rule.words}")
        if faults:
            raise OptionError(f"{type(self).__name__}: " + "; ".join(faults))

    def _local_dict(self, config: LayerConfig) -> dict[str, Any]:
        return config.to_dict() if type(config) is type(self) else {config.name: config.to_dict()}

    @classmethod
    def _local_from(cls, fields: Mapping[str, Any] | LayerConfig) -> LayerConfig:
        if isinstance(fields, LayerConfig):
            return fields
        if len(fields) == 1 and isinstance(next(iter(fields.values())), Mapping):
            [(algorithm, own)] = fields.items()
            return class_of(algorithm).from_dict(own)
        return cls.from_dict(fields)


@dataclasses.dataclass(frozen=True, slots=True)
class ComposedConfig:
    """Configs of several methods for one model.

    Locals and white lists win over globals, whichever config they stand in, and among equals the one further right.
    Where two globals claim a module it goes to the one further left; the other gets what the first has no method for
    (convolutions, with ``RTNConfig() + MixedPrecisionConfig()``). A config that gets nothing at all is an error.
    """

    configs: Sequence[LayerConfig]

    def __add__(self, other: LayerConfig | ComposedConfig) -> ComposedConfig:
        """This, with the configs of ``other`` behind: one of a class that is here already is merged with it."""
        found = list(self.configs)
        for config in other.configs if isinstance(other, ComposedConfig) else [other]:
            place = next((i for i, known in enumerate(found) if type(known) is type(config)), None)
            if place is None:
                found.append(config)
            else:
                found[place] = _merged(found[place], config)
        return ComposedConfig(found)

    def expand(self) -> list[ComposedConfig]:
        """One config for each combination; see `LayerConfig.expand`."""
        return [ComposedConfig(chosen) for chosen in itertools.product(*(config.expand() for config in self.configs))]

    def to_dict(self) -> dict[str, Any]:
        """The dict of each config by the name of its algorithm."""
        return {config.name: config.to_dict() for config in self.configs}

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> ComposedConfig:
        """What `to_dict` gave."""
        return cls([class_of(name).from_dict(fields) for name, fields in config_dict.items()])

    def to_json_string(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_json_file(self, filename: str | Path) -> None:
        """Write `to_json_string` to a file."""
        atomic_write(filename, self.to_json_string().encode())

    @classmethod
    def from_json_file(cls, filename: str | Path) -> ComposedConfig:
        """Read what `to_json_file` wrote."""
        return cls.from_dict(json.loads(Path(filename).read_text()))


AnyConfig = LayerConfig | ComposedConfig


def class_of(algorithm: str) -> type[LayerConfig]:
    """The config class of Neural Compressor's name for an algorithm ("rtn", "gptq", ...).

    Raises:
        OptionError: no such algorithm
    """
    known = {cls.name: cls for cls in LayerConfig.__subclasses__()}
    if algorithm not in known:
        raise OptionError(f"no algorithm {algorithm!r}{nearest(algorithm, known)}; known are {', '.join(known)}")
    return known[algorithm]


def as_config(quant_config: AnyConfig | Mapping[str, Any]) -> AnyConfig:
    """A config of one's own, from a config or a dict such as ``{"rtn": {"bits": 4}, "gptq": {...}}``."""
    if isinstance(quant_config, LayerConfig | ComposedConfig):
        return copy.deepcopy(quant_config)
    if not isinstance(quant_config, Mapping) or not quant_config:
        raise OptionError(f"quant_config={quant_config!r}: expected a config such as RTNConfig(), or a dict of them")
    composed = ComposedConfig.from_dict(quant_config)
    return composed.configs[0] if len(composed.configs) == 1 else composed


def _merged(left: LayerConfig, right: LayerConfig) -> LayerConfig:
    """``left`` with what ``right`` says of some layers only; the global is the first that there is."""
    if not _claims(right) and right.white_list == "*" == left.white_list and right != left:
        raise OptionError(
            f"+ {right!r} adds nothing: the global config is {left!r}, and the right one has neither a white_list nor "
            f"a set_local"
        )
    found = copy.deepcopy(right if left.white_list != "*" == right.white_list else left)
    found.locals.clear()
    for key, config in [*_claims(left, white=found.white_list == "*"), *_claims(right)]:
        found.set_local(key, config)
    return found


def _claims(config: LayerConfig, *, white: bool = True) -> list[tuple[Key, LayerConfig]]:
    """What ``config`` says of some layers: its white list, where ``white`` is wanted, then its locals."""
    own = copy.deepcopy(config)
    own.white_list = "*"
    own.locals.clear()
    listed = [] if config.white_list == "*" or not white else config.white_list
    return [*((key, own) for key in listed), *config.locals]


def _key_text(key: Key) -> str:
    return key if isinstance(key, str) else key.__name__


def _plain(value: Any) -> Any:
    """``value`` as JSON has it: classes by name, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.__name__ if isinstance(value, type) else value
