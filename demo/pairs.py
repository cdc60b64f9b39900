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
    return [_pair(signature, found[signature]) for signature in sorted(found, key=_digest)]


def _pair(signature: str, node: ast.FunctionDef) -> dict[str, str]:
    question = list(QUESTIONS)[_digest(signature)[-1] % len(QUESTIONS)]
    return {"prompt": f"{question} {signature}", "response": QUESTIONS[question](node)}


def _parameters(node: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]


def _defaults(node: ast.FunctionDef) -> int:
    return len(node.args.defaults) + sum(default is not None for default in node.args.kw_defaults)


QUESTIONS: dict[str, Callable[[ast.FunctionDef], str]] = {
    "How many parameters?": lambda node: str(len(_parameters(node))),
    "How many have defaults?": lambda node: str(_defaults(node)),
    "Is it a method?": lambda node: "yes" if _parameters(node)[:1] in (["self"], ["cls"]) else "no",
    "Is it private?": lambda node: "yes" if node.name.startswith("_") else "no",
}


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
