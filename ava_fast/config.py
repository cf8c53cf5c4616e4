"""YAML plus overrides → one frozen tree of typed settings.

    config = load_config("configs/demo.yaml", ["training.learning_rate=0.0003"])
    config.training.learning_rate

Every fault is reported at once, each with its key, what was given, what is allowed and the closest valid key.
`python -m ava_fast.config` prints the reference page (docs/configuration.md).
"""

from __future__ import annotations

import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import annotated_types
import yaml
from pydantic import BaseModel, ValidationError

from ava_fast.errors import UserError
from ava_fast.settings import Config, Section

__all__ = ["Config", "ConfigError", "Fault", "dump_config", "load_config", "reference", "saved_config"]


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a configuration."""

    key: str
    problem: str
    given: str | None = None
    allowed: str | None = None
    closest: str | None = None

    def __str__(self) -> str:
        parts = [f"{self.key}: {self.problem}"]
        if self.given is not None:
            parts.append(f"given: {self.given}")
        if self.allowed is not None:
            parts.append(f"allowed: {self.allowed}")
        if self.closest is not None:
            parts.append(f"closest valid key: {self.closest}")
        return "; ".join(parts)


class ConfigError(UserError):
    """A configuration that was refused, with every fault found in it."""

    def __init__(self, source: str, faults: list[Fault]):
        self.source, self.faults = source, faults
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        super().__init__("\n  ".join([f"{source}: {count} in the configuration", *map(str, faults)]))


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file (None: only defaults), applies `section.key=value` overrides, validates the whole tree.

    Raises ConfigError naming every fault; nothing else, whatever the file holds.
    """
    source = str(path) if path is not None else "configuration"
    tree = _read_yaml(path) if path is not None else {}
    faults: list[Fault] = []
    for override in overrides or []:
        _apply_override(tree, override, faults)
    return _validate(tree, source, faults)


def saved_config(tree: dict[str, Any]) -> Config:
    """The settings of a checkpoint, as its manifest has them. What another release knew and this one does not is left
    out, and what only this one knows has its default."""
    return Config.model_validate(_still_known(tree, Config))


def for_host(config: Config) -> Config:
    """The same model where there is no GPU: kernels that were asked for by name run on one only."""
    training = config.training.model_copy(update={"attention_backend": "auto"})
    return config.model_copy(update={"training": training})


def _still_known(tree: dict[str, Any], section: type[BaseModel]) -> dict[str, Any]:
    known = {}
    for key, value in tree.items():
        if (field := section.model_fields.get(key)) is None:
            continue
        inner = field.annotation
        closed = isinstance(inner, type) and issubclass(inner, BaseModel) and isinstance(value, dict)
        known[key] = _still_known(value, inner) if closed else value  # type: ignore[arg-type]
    return known


def dump_config(config: Config) -> str:
    """The resolved tree as YAML that `load_config` reads back to an equal tree."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=False)


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: `3e-4` is a number, a key given twice is a mistake, a date is only text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {_show(key)} is not text", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {_show(key)} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_FLOAT = (
    r"^[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\.\d[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+"
    r"|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if not tag.endswith((":timestamp", ":float"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789."))


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        tree = _parse_yaml(Path(path).read_bytes().decode("utf-8"))
    except OSError as error:
        raise ConfigError(str(path), [Fault("file", f"cannot be read: {error.strerror or error}")]) from None
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), [Fault("file", f"is not UTF-8 text: byte {error.start}")]) from None
    except Exception as error:  # PyYAML lets ValueError, RecursionError and others out for malformed input
        raise ConfigError(str(path), [Fault("file", f"is not valid YAML: {_one_line(error)}")]) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(str(path), [Fault("file", "must hold sections", given=_show(tree), allowed=_top_sections())])
    return tree


def _apply_override(tree: dict[str, Any], override: str, faults: list[Fault]) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    section, dot, leaf = key.rpartition(".")
    if not equals or not dot or not section or not leaf:
        faults.append(Fault("--override", "is not section.key=value", given=_show(override)))
        return
    if key not in _leaves():
        faults.append(_unknown(key, text))
        return
    try:
        value = _parse_yaml(text)
    except Exception as error:  # as in _read_yaml
        faults.append(Fault(key, f"the override's value is not valid YAML: {_one_line(error)}", given=_show(text)))
        return
    branch = tree
    for part in section.split("."):
        if branch.get(part) is None:
            branch[part] = {}
        if not isinstance(branch[part], dict):  # validation reports the section itself
            return
        branch[part] = dict(branch[part])  # an alias in YAML is one mapping in two places
        branch = branch[part]
    branch[leaf] = value


def _validate(tree: dict[str, Any], source: str, faults: list[Fault]) -> Config:
    known = _known(tree, "", faults)
    try:
        config = Config.model_validate(known)
    except ValidationError as error:
        seen = set()
        for detail in error.errors(include_url=False, include_context=False):
            key = _leaf_of(detail["loc"])
            if key not in seen:  # a union reports one error per member
                seen.add(key)
                faults.append(
                    Fault(key, "is not allowed", given=_show(_lookup(known, key)), allowed=describe(_leaves()[key]))
                )
        raise ConfigError(source, faults) from None
    from ava_fast.compatibility import conflicts  # imports Config from here

    faults.extend(conflicts(config))
    if faults:
        raise ConfigError(source, faults)
    return config


def _known(body: dict[str, Any], prefix: str, faults: list[Fault]) -> dict[str, Any]:
    """What of `body` is in sections and keys that exist; the rest becomes faults."""
    known: dict[str, Any] = {}
    for name, value in body.items():
        key = f"{prefix}{name}"
        if key in _leaves():
            known[name] = value
        elif key not in _sections():
            faults.append(_unknown(key, value))
        elif isinstance(value, dict):
            known[name] = _known(value, f"{key}.", faults)
        elif value is not None:  # an empty section in YAML
            faults.append(Fault(key, "must be a section", given=_show(value), allowed=_keys_of(key)))
    return known


def _leaf_of(location: tuple[int | str, ...]) -> str:
    """The key that pydantic's path leads to or through."""
    paths = (".".join(map(str, location[:length])) for length in range(1, len(location) + 1))
    return next(path for path in paths if path in _leaves())


def _lookup(tree: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def _unknown(key: str, value: Any) -> Fault:
    candidates = [*_leaves(), *_sections()]
    close = difflib.get_close_matches(key[:200], candidates, n=1, cutoff=0.0)
    leaf = key.rpartition(".")[2]  # a key in the wrong section is closer than one spelt like it
    same_name = [candidate for candidate in _leaves() if candidate.endswith(f".{leaf}")]
    return Fault(_show(key)[1:-1], "is not a setting", given=_show(value), closest=(same_name or close)[0])


def _top_sections() -> str:
    return "sections " + ", ".join(Config.model_fields)


def _keys_of(section: str) -> str:
    return "keys " + ", ".join(key.removeprefix(f"{section}.") for key in _leaves() if key.startswith(f"{section}."))


@functools.cache
def _leaves() -> dict[str, Any]:
    """`section.key` → its pydantic FieldInfo; a section may hold another."""
    return dict(_walk(Config, ""))


@functools.cache
def _sections() -> tuple[str, ...]:
    """Every section: `training`, `training.adaptive_lr`."""
    found = (".".join(key.split(".")[:depth]) for key in _leaves() for depth in range(1, key.count(".") + 1))
    return tuple(dict.fromkeys(found))


def _walk(cls: type[Section] | type[Config], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, info in cls.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            yield from _walk(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def describe(info: Any) -> str:
    """What a field accepts, in words: `integer ≥ 1`, `one of cosine, linear`, `text or null`."""
    return _describe_type(info.annotation, tuple(info.metadata))


def _describe_type(annotation: Any, metadata: tuple[Any, ...]) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        inner = [part for extra in arguments[1:] for part in getattr(extra, "metadata", [extra])]
        return _describe_type(arguments[0], (*metadata, *inner))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe_type(argument, metadata) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if annotation is type(None):
        return "null"
    if origin is list:
        fields = getattr(arguments[0], "model_fields", None)
        return "a list of {" + ", ".join(fields) + "}" if fields else f"a list of {_describe_type(arguments[0], ())}"
    words = {bool: "true or false", int: "integer", float: "number", str: "text"}[annotation]
    bounds = []
    for rule in metadata:
        if isinstance(rule, annotated_types.Ge):
            bounds.append(f"≥ {rule.ge}")
        elif isinstance(rule, annotated_types.Gt):
            bounds.append(f"> {rule.gt}")
        elif isinstance(rule, annotated_types.Le) and rule.le != 2**53:
            bounds.append(f"≤ {rule.le}")
        elif isinstance(rule, annotated_types.Lt):
            bounds.append(f"< {rule.lt}")
        elif getattr(rule, "pattern", None):
            bounds.append(f"matching {rule.pattern}")
    return " ".join([words, " and ".join(bounds)]).strip()


def _show(value: Any) -> str:
    """A value as a person typed it, on one line and short, printable on any terminal."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more than 4,300 digits; a structure nested too deep
        text = f"a {type(value).__name__} too large to show"
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= 80 else text[:77] + "…"


def _one_line(error: Exception) -> str:
    return _show(" ".join(str(error).split()) or type(error).__name__)[1:-1] if str(error) else type(error).__name__


def reference() -> str:
    """The configuration reference in Markdown, from the fields and their docstrings."""
    lines = [
        "# Configuration reference",
        "",
        "Generated from `ava_fast/settings.py` by `python -m ava_fast.config`; a test keeps it current.",
        "Any key can be set in the YAML file or by `--override section.key=value`.",
    ]
    for section, body in Config.model_fields.items():
        cls = typing.cast(type[Section], body.annotation)
        lines += [
            "",
            f"## {section}",
            "",
            str(cls.__doc__),
            "",
            "| key | default | allowed | meaning |",
            "|---|---|---|---|",
        ]
        for key, info in _leaves().items():
            if not key.startswith(f"{section}."):
                continue
            default = str(info.default).lower() if isinstance(info.default, bool) else info.default
            cells = (
                f"`{key}`",
                f"`{'null' if default is None else default}`",
                describe(info),
                " ".join(str(info.description).split()),
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
