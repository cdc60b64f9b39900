"""Question–answer pairs about the functions of the Python standard library: real text that every machine has."""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "lib2to3", "__pycache__", "idlelib"}
LONGEST = 160  # characters of a signature


def pairs() -> list[dict[str, str]]:
    """{prompt, response}: a function's signature, and its name or its parameters.

    Each signature is asked about once. The order hangs on nothing but the texts, so that the tail is a fair sample.
    """
    library = Path(sysconfig.get_path("stdlib"))
    found: dict[str, dict[str, str]] = {}
    for file in sorted(library.rglob("*.py")):
        if LEFT_OUT & set(file.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, SyntaxError):
            continue
        for signature, name, parameters in _functions(tree):
            if len(signature) <= LONGEST and parameters:
                odd = _digest(signature)[0] % 2
                question, answer = ("name", name) if odd else ("parameters", ", ".join(parameters))
                found[signature] = {"prompt": f"{question}: {signature}", "response": answer}
    return sorted(found.values(), key=lambda pair: _digest(pair["prompt"]))


def _functions(tree: ast.AST) -> Iterator[tuple[str, str, list[str]]]:
    """Signature, name and parameters of each."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            yield f"def {node.name}({ast.unparse(node.args)}):", node.name, arguments


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
