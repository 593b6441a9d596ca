"""Strict YAML to frozen dataclasses and back: types, ranges, unknown keys, and what fields mean.

A class says all of it: annotations are types, ``Positive`` and its like are ranges,
``Literal`` is a choice, a union of classes is chosen by ``name``, and the string below a field is
its description.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import re
import reprlib
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml


@dataclass(frozen=True)
class Range:
    """Bounds of a number."""

    above: float | None = None
    least: float | None = None
    most: float | None = None

    def problem(self, value: float) -> str | None:
        """What a number must be and is not."""
        if self.above is not None and not value > self.above:
            return f"above {self.above:g}"
        if self.least is not None and not value >= self.least:
            return f"{self.least:g} or more"
        if self.most is not None and not value <= self.most:
            return f"at most {self.most:g}"
        return None


Positive = Annotated[float, Range(above=0)]
PositiveInt = Annotated[int, Range(above=0)]
NonNegative = Annotated[float, Range(least=0)]
NonNegativeInt = Annotated[int, Range(least=0)]
Share = Annotated[float, Range(least=0, most=1)]
PositiveShare = Annotated[float, Range(above=0, most=1)]

_MAX_BYTES = 2**20


class ConfigError(ValueError):
    """A config is wrong; ``problems`` lists everything that is, each with its dotted path."""

    def __init__(self, problems: Sequence[str], source: str = "config") -> None:
        """Keeps the list and joins it into one message."""
        self.problems = tuple(problems)
        super().__init__(
            f"{source}: " + "\n  ".join(("", *problems) if len(problems) > 1 else problems)
        )


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values (tuples become lists), as YAML and JSON have them."""
    return _plain(dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    """YAML that ``load_config`` reads back to an equal config."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def describe(config: Any, presets: Callable[[Any], Any]) -> str:
    """The config as YAML with what each field means above it; it can be loaded again.

    ``presets`` of a section: an object with what its unset fields stand for, or None.
    """
    head = _comment(_docs(type(config))[""], "")
    return "\n".join([*head, *_describe(config, presets, 0)]) + "\n"


def out_of_range(config: Any, path: str = "") -> Iterator[str]:
    """Every number of a config, however it was made, that is outside its ``Range``."""
    for name, ranges in _bounds(type(config)).items():
        value, where = getattr(config, name), _join(path, name)
        if dataclasses.is_dataclass(value):
            yield from out_of_range(value, where)
            continue
        values = value if isinstance(value, tuple) else (value,)
        bounds = [] if value is None else ranges
        if said := [text for bound in bounds for v in values if (text := bound.problem(v))]:
            yield f"{where}: must be {said[0]}, found {_plain(value)}"


@cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    """Of a class's fields; found once: a sweep builds thousands of configs."""
    return get_type_hints(cls, include_extras=True)


@cache
def _bounds(cls: type[Any]) -> dict[str, list[Range]]:
    return {name: _ranges(hint) for name, hint in _hints(cls).items()}


def _ranges(hint: Any) -> list[Range]:
    """Those of an annotation, wherever they are in it."""
    if get_origin(hint) is Annotated:
        return [extra for extra in hint.__metadata__ if isinstance(extra, Range)]
    inner = [found for part in get_args(hint) for found in _ranges(part)]
    return list(dict.fromkeys(inner))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


# ---------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """Safe YAML with duplicate keys as errors and 1e-3 as a number (as in YAML 1.2)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that ``_Loader`` takes for numbers or folds; writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(  # single quotes fold line breaks, of which Unicode has several
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, None if text.isprintable() else '"'
    ),
)


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+\Z"),
        list("-+.0123456789"),
    )


def parse_yaml(text: str, source: str) -> Any:
    """Plain values of strict YAML; raises ConfigError."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError([f"{where}{error.problem or error.context}"], source) from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        # PyYAML lets through what int(), float() and date() raise on malformed scalars
        raise ConfigError([f"not valid YAML: {error}"], source) from error


def read_yaml(source: str) -> dict[str, Any]:
    """The section that a YAML file holds, as plain values; raises ConfigError."""
    try:
        with Path(source).open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError([f"cannot be read: {error}"], source) from error
    if len(data) > _MAX_BYTES:
        raise ConfigError([f"larger than {_MAX_BYTES} bytes: is it a config?"], source)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError([f"not UTF-8 text (byte {error.start})"], source) from error
    values = parse_yaml(text, source)
    if values is None:  # an empty file, or only comments
        return {}
    if not isinstance(values, dict):
        raise ConfigError([f"expected `key: value` lines, found {show(values)}"], source)
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Sets ``a.b=value`` in nested plain values; raises ConfigError."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError([f"--set {override!r}: expected a.b=value"])
    for depth, key in enumerate(keys[:-1], 1):
        child = values.get(key)
        values[key] = {} if child is None else child  # `env:` without anything below it
        if not isinstance(values[key], dict):
            raise ConfigError([f"--set {override!r}: {'.'.join(keys[:depth])} is not a section"])
        values = values[key]
    values[keys[-1]] = parse_yaml(text, f"--set {override!r}")


# ---------------------------------------------------------------- plain values -> dataclass


class _WrongType(Exception):  # noqa: N818  (becomes a line of a ConfigError)
    """What was expected."""


def build(cls: type[Any], values: Any, path: str, problems: list[str]) -> Any:
    """An instance of a dataclass, or None after adding to ``problems``."""
    if not isinstance(values, dict):
        problems.append(f"{path}: expected a section ({words(_names(cls))}), found {show(values)}")
        return None
    hints = _hints(cls)
    before, found = len(problems), {}
    for key, value in values.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            hint = f"did you mean {_join(path, near[0])}?" if near else f"it has {words(hints)}"
            problems.append(f"{_REPR.repr(where)[1:-1]}: unknown key; {hint}")
        elif variants := _variants(hints[key]):
            # `env:` with everything below it commented out is an empty section
            inner = {} if value is None else value
            if (variant := _choose(variants, inner, where, problems)) is not None:
                found[key] = build(variant, inner, where, problems)
        else:
            try:
                found[key] = _convert(hints[key], value)
            except _WrongType as wrong:
                problems.append(f"{where}: expected {wrong}, found {show(value)}")
    if len(problems) > before:
        return None
    try:
        return cls(**found)
    except ValueError as error:  # of a class that checks itself; it names the field
        problems.append(_join(path, str(error)))
        return None


def _variants(hint: Any) -> tuple[type[Any], ...]:
    """The dataclasses that a section may be, the default first; none of a plain value."""
    parts = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return parts if all(dataclasses.is_dataclass(part) for part in parts) else ()


def _choose(
    variants: tuple[type[Any], ...], values: Any, path: str, problems: list[str]
) -> type[Any] | None:
    """The class whose ``name`` a section gives, or None after adding to ``problems``."""
    if len(variants) == 1 or not isinstance(values, dict) or "name" not in values:
        return variants[0]
    by_name = {variant.name: variant for variant in variants}
    asked = values["name"]
    if isinstance(asked, str) and asked in by_name:
        return by_name[asked]
    problems.append(f"{path}.name: expected one of {words(by_name)}, found {show(asked)}")
    return None


def _convert(hint: Any, value: Any) -> Any:
    """The value as the annotated type; raises _WrongType with what was expected."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _convert(args[0], value)
    if origin in (Union, types.UnionType):
        (inner,) = (a for a in args if a is not types.NoneType)
        if value is None:
            return None
        try:
            return _convert(inner, value)
        except _WrongType as wrong:
            raise _WrongType(f"{wrong} or null") from None
    if origin is Literal:
        if isinstance(value, str) and value in args:
            return value
        raise _WrongType(f"one of {words(args)}")
    if origin is tuple:
        return _convert_tuple(args, value)
    if hint is bool and isinstance(value, bool):
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int and is_number and abs(value) < 2**63 and value == int(value):
        return int(value)  # 2e5 is a whole number too
    if hint is float and is_number and abs(value) < 1e300:  # no nan, no inf, no endless integers
        return float(value)
    if hint is str and isinstance(value, str):
        return value
    raise _WrongType(
        {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}[hint]
    )


def _convert_tuple(args: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    is_open = len(args) == 2 and args[1] is Ellipsis
    try:
        if not isinstance(value, list | tuple) or not (is_open or len(value) == len(args)):
            _convert(args[0], None)  # for the name of the type
        inner = args[:1] * len(value) if is_open else args
        return tuple(_convert(a, v) for a, v in zip(inner, value, strict=True))
    except _WrongType as wrong:
        count = "a list" if is_open else f"a list of {len(args)}"
        raise _WrongType(f"{count} ({wrong} each)") from None


def _names(cls: type[Any]) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def words(names: Any) -> str:
    """Names one after the other."""
    return ", ".join(str(name) for name in names)


# YAML aliases can make a value of endless length: few items, few levels
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict, _REPR.maxstring = 3, 3, 3, 60


def show(value: Any) -> str:
    """A value as a message has it: what kind it is, and its beginning."""
    kind = {dict: "a section", list: "a list", str: "text", type(None): "nothing"}.get(type(value))
    shown = _REPR.repr(value)
    return kind or shown if value is None else f"{kind} {shown}" if kind else shown


# ---------------------------------------------------------------- for people


def _describe(config: Any, presets: Callable[[Any], Any], indent: int) -> Iterator[str]:
    pad, docs, resolved = "  " * indent, _docs(type(config)), presets(config)
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield ""
            yield from _comment(_docs(type(value))[""], pad)
            yield f"{pad}{f.name}:"
            yield from _describe(value, presets, indent + 1)
            continue
        yield from _comment(docs.get(f.name, ""), pad)
        # a list of one in flow style: its inside is the value on one line
        text = yaml.dump([_plain(value)], Dumper=_Dumper, default_flow_style=True, width=10**6)
        line = f"{pad}{f.name}: {text.strip()[1:-1]}"
        if value is None and resolved is not None:
            line += f"  # preset: {_plain(getattr(resolved, f.name))}"
        yield line


def _comment(text: str, pad: str) -> list[str]:
    prefix = pad + "# "
    return textwrap.wrap(text, 100, initial_indent=prefix, subsequent_indent=prefix)


@cache
def _docs(cls: type[Any]) -> dict[str, str]:
    """A class's docstring under "", and of each field, inherited ones too, the string below it."""
    docs: dict[str, str] = {}
    for base in reversed([c for c in cls.__mro__ if dataclasses.is_dataclass(c)]):
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(node, ast.ClassDef)
        for name, below in zip(node.body, node.body[1:], strict=False):
            match (name, below):
                case (
                    ast.AnnAssign(target=ast.Name(id=field_name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    docs[field_name] = inspect.cleandoc(text)
    docs[""] = inspect.getdoc(cls) or ""
    return docs
