"""YAML file + `key=value` overrides → a checked Config, or one error that lists every problem with its place."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from llada_train.config.errors import UserError
from llada_train.config.schema import Config, check_world_size, cross_section_problems

Location = tuple[int | str, ...]


def load_config(path: Path, overrides: Sequence[str] = (), world_size: int | None = None) -> Config:
    """Read a config file, apply dotted overrides (`training.micro_batch_size=2`), and check everything at once.

    A section may name another YAML file, relative to the one that names it (`model: ../model/llada_8b.yaml`).
    `world_size`, where known, is checked against the parallel sizes.

    Raises:
        UserError: the file cannot be read, or any setting is wrong; all problems are listed.
    """
    tree = _read_yaml(path)
    sources: dict[str, Path] = {}
    for key, value in list(tree.items()):
        if isinstance(value, str) and value.endswith((".yaml", ".yml")):
            sources[key] = path.parent / value
            tree[key] = _read_yaml(sources[key])
    overridden = {_override(tree, text) for text in overrides}
    found: list[tuple[Location, str]] = []
    config: Config | None = None
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        found = [_describe(tree, dict(e)) for e in error.errors()]
    if config is not None:
        rules = cross_section_problems(config)
        if world_size is not None and not rules:
            rules = check_world_size(config, world_size)
        found = [(tuple(key.split(".")), message) for key, message in rules]
    if config is None or found:
        lines = [f"  {_place(tree, path, sources, overridden, loc)}: {message}" for loc, message in found]
        count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise UserError("\n".join([f"{path}: {count} in the config:", *lines]))
    return config


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config, every default spelled out, as YAML that `load_config` reads back unchanged."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(config.model_dump(mode="json"), file)


def differences(old: BaseModel, new: BaseModel) -> list[str]:
    """One line for each setting that differs: `key: old → new`."""
    a, b = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    return [f"{key}: {a.get(key)} → {b.get(key)}" for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items: list[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat.update(_flatten(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _read_yaml(path: Path) -> CommentedMap:
    try:
        # The round-trip loader keeps line numbers and builds plain data only; YAML 1.2 reads 1e-4 as a number.
        tree = YAML(typ="rt").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, CommentedMap):
        raise UserError(f"{path}: expected `key: value` lines at the top level, found {type(tree).__name__}")
    return tree


def _override(tree: CommentedMap, text: str) -> Location:
    """Set one `a.b.c=value` in the tree; list items are addressed by number."""
    dotted, equals, value = text.partition("=")
    if not equals or not dotted:
        raise UserError(f"override {text!r}: expected key=value, for example training.micro_batch_size=2")
    try:
        parsed = YAML(typ="rt").load(value)
    except YAMLError:
        raise UserError(f"override {text!r}: {value!r} is not valid YAML") from None
    *parents, last = dotted.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        key = _list_index(node, part, text)
        if isinstance(node, CommentedMap) and node.get(key) is None:
            node[key] = CommentedMap()
        node = node[key]
        if not isinstance(node, CommentedMap | CommentedSeq):
            raise UserError(f"override {text!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    node[_list_index(node, last, text)] = parsed
    return tuple(dotted.split("."))


def _list_index(node: Any, part: str, text: str) -> int | str:
    if not isinstance(node, CommentedSeq):
        return part
    if not part.isdecimal() or int(part) >= len(node):
        raise UserError(f"override {text!r}: {part!r} is not an index of a list of {len(node)}")
    return int(part)


def _describe(tree: CommentedMap, error: dict[str, Any]) -> tuple[Location, str]:
    loc: Location = error["loc"]
    if error["type"] == "rule":
        return (*loc, *error["ctx"]["key"].split(".")), error["ctx"]["message"]
    if error["type"] == "extra_forbidden":
        known = _known_keys(loc[:-1])
        near = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return loc, f"unknown key; {hint}"
    if error["type"] == "missing":
        return loc, "is required"
    return loc, f"{error['msg']} (got {error['input']!r})"


def _known_keys(loc: Location) -> list[str]:
    """The keys that the section at `loc` accepts."""
    section: Any = Config
    for part in loc:
        if isinstance(part, int):
            continue
        annotation: Any = section.model_fields[part].annotation
        while not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            annotation = get_args(annotation)[0]
        section = annotation
    return list(section.model_fields)


def _place(tree: CommentedMap, path: Path, sources: dict[str, Path], overridden: set[Location], loc: Location) -> str:
    key = ".".join(map(str, loc))
    if any(tuple(map(str, loc[: len(o)])) == o for o in overridden):
        return f"{key} (override)"
    file = sources.get(str(loc[0]), path) if loc else path
    node: Any = tree
    line = None
    for part in loc:
        part = int(part) if isinstance(node, CommentedSeq) and str(part).isdecimal() else part
        try:
            line = (node.lc.item(part) if isinstance(node, CommentedSeq) else node.lc.key(part))[0] + 1
            node = node[part]
        except (KeyError, IndexError, AttributeError, TypeError):
            break
    return f"{key} ({file}, line {line})" if line is not None else key
