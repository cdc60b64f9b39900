"""YAML file + `key=value` overrides → a checked Config, or one error that lists every problem with its place."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from llada_train.config.errors import UserError
from llada_train.config.rules import check_world_size, cross_section_problems
from llada_train.config.schema import Config, ModelConfig

Location = tuple[int | str, ...]


def load_config(path: Path, overrides: Sequence[str] = (), world_size: int | None = None) -> Config:
    """Read the config of a run; `world_size`, where known, is checked against the parallel sizes.

    Raises:
        UserError: as `load`.
    """

    def rules(config: Config) -> list[tuple[str, str]]:
        found = cross_section_problems(config)
        if world_size is None:
            return found
        told = {key for key, _ in found}
        return found + [rule for rule in check_world_size(config, world_size) if rule[0] not in told]

    return load(Config, path, overrides, rules)


Root = TypeVar("Root", bound=BaseModel)


def load(
    root: type[Root],
    path: Path,
    overrides: Sequence[str] = (),
    rules: Callable[[Root], list[tuple[str, str]]] = lambda config: [],
) -> Root:
    """Read a config file, apply dotted overrides (`training.micro_batch_size=2`), and check everything at once.

    A section may name another YAML file: in a config file relative to that file (`model: ../model/llada_8b.yaml`), in
    an override relative to the working directory. `rules` finds the faults that only several sections together show.

    Raises:
        UserError: the file cannot be read, or any setting is wrong; all problems are listed.
    """
    tree = _read_yaml(path)
    sources: dict[str, Path] = {}
    _include(root, tree, path.parent, sources)
    overridden: set[Location] = set()
    problems: list[str] = []
    for text in overrides:
        try:
            overridden.add(_override(tree, text))
            from_file = _include(root, tree, Path(), sources)
            overridden = {key for key in overridden if key[0] not in from_file}
        except _OverrideError as error:
            problems.append(f"override {text!r}: {error}")
    found: list[tuple[Location, str]] = []
    config: Root | None = None
    try:
        config = root.model_validate(tree)
    except ValidationError as error:
        found = [_describe(root, dict(e)) for e in error.errors()]
    if config is not None:
        found = [(tuple(key.split(".")), message) for key, message in rules(config)]
    problems += [f"{_place(tree, path, sources, overridden, loc)}: {message}" for loc, message in found]
    if config is None or problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError("\n  ".join([f"{path}: {count} in the config:", *problems]))
    return config


def save_config(config: BaseModel, path: Path) -> None:
    """Write the resolved config, every default spelled out, as YAML that `load` reads back unchanged."""
    with path.open("w", encoding="utf-8") as file:
        YAML(typ="rt").dump(config.model_dump(mode="json"), file)


def differences(old: BaseModel, new: BaseModel) -> list[str]:
    """One line for each setting that differs: `key: old → new`."""
    a, b = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    return [f"{key}: {a.get(key)} → {b.get(key)}" for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]


def model_differences(stored: ModelConfig, wanted: ModelConfig) -> list[str]:
    """`differences` in the tensors: a run may know fewer ids than there are rows, as long as there are as many rows."""
    if stored.padded_vocab_size == wanted.padded_vocab_size:
        stored = stored.model_copy(update={"vocab_size": wanted.vocab_size})
    return differences(stored, wanted)


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


class _OverrideError(Exception):
    """What is wrong with one override."""


def _include(root: type[BaseModel], tree: CommentedMap, base: Path, sources: dict[str, Path]) -> set[str]:
    """Read the sections that are given as the path of a YAML file, and return them; `sources` remembers their files."""
    included = set()
    for key, value in tree.items():
        if isinstance(value, str) and value.endswith((".yaml", ".yml")) and _section_of(key, root) is not None:
            sources[key] = base / value
            tree[key] = _read_yaml(base / value)
            included.add(key)
    return included


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
        raise UserError(f"{path}: expected `key: value` lines at the top level, found {_kind(tree)}")
    return tree


def _override(tree: CommentedMap, text: str) -> Location:
    """Set one `a.b.c=value` in the tree; list items are addressed by number."""
    dotted, equals, value = text.partition("=")
    if not equals or not dotted:
        raise _OverrideError("expected key=value, for example training.micro_batch_size=2")
    try:
        parsed = YAML(typ="rt").load(value)
    except YAMLError:
        raise _OverrideError(f"{value!r} is not valid YAML") from None
    *parents, last = dotted.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        key = _key(node, part)
        if isinstance(node, CommentedMap) and node.get(key) is None:
            node[key] = CommentedMap()
        node = node[key]
        if not isinstance(node, CommentedMap | CommentedSeq):
            raise _OverrideError(f"{'.'.join(parents[: depth + 1])} is a value, not a section")
    node[_key(node, last)] = parsed
    return tuple(dotted.split("."))


def _key(node: Any, part: str) -> int | str:
    if not isinstance(node, CommentedSeq):
        return part
    if not part.isdecimal() or int(part) >= len(node):
        raise _OverrideError(f"{part!r} is not an index of a list of {len(node)}")
    return int(part)


def _describe(root: type[BaseModel], error: dict[str, Any]) -> tuple[Location, str]:
    loc: Location = error["loc"]
    if error["type"] == "rule":
        return (*loc, *error["ctx"]["key"].split(".")), error["ctx"]["message"]
    if error["type"] == "extra_forbidden":
        known = _known_keys(root, loc[:-1])
        near = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
        elsewhere = [key for key in _settings(root) if key.endswith(f".{loc[-1]}")]
        hint = f"did you mean {(near or elsewhere)[0]!r}?" if near or elsewhere else f"known keys: {', '.join(known)}"
        return loc, f"unknown key; {hint}"
    if error["type"] == "missing":
        return loc, "is required"
    got = error["input"]
    message = error["msg"].partition(", unable to parse")[0].replace("Input should be", "has to be")
    if error["type"] == "list_type" and (keys := _known_keys(root, loc)) != _known_keys(root, loc[:-1]):
        message += f" of sections with the keys {', '.join(keys)}"
    return loc, f"{message} (got {_kind(got) if isinstance(got, dict | list) else repr(got)})"


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return "a list"
    return "nothing" if value is None else repr(value)


def _known_keys(root: type[BaseModel], loc: Location) -> list[str]:
    """The keys that the section at `loc`, or the one that a plain setting is in, accepts."""
    section = root
    for part in loc:
        if isinstance(part, str):
            section = _section_of(part, section) or section
    return list(section.model_fields)


def _settings(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted keys of all plain settings, without those in lists."""
    for key in section.model_fields:
        inner = _section_of(key, section)
        if inner is None:
            yield prefix + key
        elif "list" not in str(section.model_fields[key].annotation):
            yield from _settings(inner, f"{prefix}{key}.")


def _section_of(key: Any, parent: type[BaseModel]) -> type[BaseModel] | None:
    """The type of `parent`'s section, or list of sections, called `key`; None: it is a plain setting, or unknown."""
    field = parent.model_fields.get(key)
    annotation: Any = field.annotation if field else None
    while annotation is not None and not isinstance(annotation, type):
        annotation = next(iter(get_args(annotation)), None)
    return annotation if annotation is not None and issubclass(annotation, BaseModel) else None


def _place(tree: CommentedMap, path: Path, sources: dict[str, Path], overridden: set[Location], loc: Location) -> str:
    """`key (file, line n)`; a key that is not in the file has the line of the section that lacks it."""
    key = ".".join(map(str, loc))
    if any(tuple(map(str, loc[: len(o)])) == o for o in overridden):
        return f"{key} (override)"
    file, node, line = path, tree, None
    for depth, part in enumerate(loc):
        part = int(part) if isinstance(node, CommentedSeq) and str(part).isdecimal() else part
        try:
            line = (node.lc.item(part) if isinstance(node, CommentedSeq) else node.lc.key(part))[0] + 1
            node = node[part]
        except (KeyError, IndexError, AttributeError, TypeError):
            break
        if depth == 0 and part in sources:
            file, line = sources[part], 1
    return f"{key} ({file}, line {line})" if line is not None else key
