"""Question–answer pairs about the functions of the Python standard library: real text that every machine has."""

import ast
import hashlib
import sysconfig
from collections.abc import Callable
from pathlib import Path

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "lib2to3", "__pycache__", "idlelib"}
LONGEST = 100  # characters of a signature


def pairs() -> list[dict[str, str]]:
    """{prompt, response}: a question about a function's signature, and its answer, a word.

    Each signature is asked about once. The order hangs on nothing but the texts, so that the tail is a fair sample.
    """
    library = Path(sysconfig.get_path("stdlib"))
    found: dict[str, ast.FunctionDef] = {}
    for file in sorted(library.rglob("*.py")):
        if LEFT_OUT & set(file.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                signature = f"def {node.name}({ast.unparse(node.args)})"
                if len(signature) <= LONGEST:
                    found.setdefault(signature, node)
    order = sorted(found, key=_digest)
    return [
        {
            "prompt": f"{(asked := _QUESTIONS[_digest(one)[0] % len(_QUESTIONS)])[0]} {one}",
            "response": asked[1](found[one]),
        }
        for one in order
    ]


def _parameters(node: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]


def _first(node: ast.FunctionDef) -> str:
    return next(iter(_parameters(node)), "none")


_QUESTIONS: list[tuple[str, Callable[[ast.FunctionDef], str]]] = [
    ("How many parameters?", lambda node: str(len(_parameters(node)))),
    (
        "How many have defaults?",
        lambda node: str(len(node.args.defaults) + len([d for d in node.args.kw_defaults if d])),
    ),
    ("Is it a method?", lambda node: "yes" if _first(node) in ("self", "cls") else "no"),
    ("Is it private?", lambda node: "yes" if node.name.startswith("_") else "no"),
]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
