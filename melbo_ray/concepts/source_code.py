"""Detection of source code and its language, by parsing as Python, by code fences, and by lines and tokens.

This is a heuristic for short, often truncated texts of language models, on which pygments' own guess fails: it takes
any prose with the word "import" for Python.
"""

import ast
import re

from pygments.lexers import get_lexer_by_name
from pygments.token import Comment, Error, Keyword, Name, Token
from pygments.util import ClassNotFound

_LANGUAGES = ("python", "javascript", "java", "c", "cpp", "csharp", "go", "rust", "php", "ruby", "bash", "sql", "html")
_PROSE = {"text", "markdown", "md", "plaintext", "txt", "output", "tex", "latex"}
_FENCE = re.compile(r"```[ \t]*([\w+#-]*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_CODE_LINE = re.compile(
    r"""^\s*(?:
      .*[;{}]\s*(?://.*)?                                                  # ends a statement or a block
    | (?:def|class|if|elif|else|for|while|try|except|with)\b.*:\s*         # opens a Python block
    | (?:import\s+[\w.]+(?:\s+as\s+\w+)?|from\s+[\w.]+\s+import\b.*)\s*    # imports
    | \#\s*include\b.* | \#!.* | (?:const|let|var)\s+\w+\s*=.*
    | return\b\s*[\w(\[{"'-]?[^\s]*\s*
    | [A-Za-z_][\w.\[\]"']*\s*[-+*/|&]?=(?!=).*                              # assigns
    | [A-Za-z_][\w.]*\(.*\)\s*                                             # calls
    | </?[A-Za-z][^<>]*>.* | <!DOCTYPE.*
    | (?:SELECT|INSERT\ INTO|CREATE\ TABLE|UPDATE|DELETE\ FROM)\b.*
    )$""",
    re.VERBOSE,
)
_SUBSTANCE = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AugAssign, ast.For, ast.While)
_MEANING = (Keyword, Name.Builtin, Name.Function, Name.Tag, Comment.Preproc)


def code_lines(text: str) -> float:
    """The share of the text's non-blank lines that look like code; every line within a fence counts as code."""
    fenced = [line for _, body in _FENCE.findall(text) for line in body.splitlines() if line.strip()]
    rest = [line for line in _FENCE.sub("\n", text).splitlines() if line.strip()]
    code = len(fenced) + sum(bool(_CODE_LINE.match(line)) for line in rest)
    return code / (len(fenced) + len(rest)) if fenced or rest else 0.0


def language(text: str) -> str | None:
    """The programming language of the text (a pygments name), or None.

    It is the language named by a fence, if pygments knows it; `python` if the code without its truncated end parses as
    Python and has an effect; otherwise, if half of at least two lines look like code, the language whose lexer finds
    the most meaningful tokens and the fewest errors.
    """
    fence = _FENCE.search(text)
    if fence:
        named = _known(fence[1])
        if named:
            return named
    # The first fence may be a closing one, so the text before it is a candidate too.
    parts = [fence[2], text[: fence.start()]] if fence else [text]
    if any(map(_is_python, parts)):
        return "python"
    code = parts[0]
    if code_lines(code) < 0.5 or len(code.strip().splitlines()) < 2:
        return None
    best = max(_LANGUAGES, key=lambda name: _meaning(name, code))
    return best if _meaning(best, code) > 0 else None


def _known(tag: str) -> str | None:
    if not tag or tag.lower() in _PROSE:
        return None
    try:
        return get_lexer_by_name(tag.lower()).aliases[0]
    except ClassNotFound:
        return None


def _is_python(code: str) -> bool:
    """Whether the code, without at most three last lines, parses as Python and contains more than bare expressions."""
    lines = code.strip("\n").splitlines()
    for end in range(len(lines), max(0, len(lines) - 4), -1):
        try:
            tree = ast.parse("\n".join(lines[:end]))
        except (SyntaxError, ValueError):
            continue
        calls = (node for node in tree.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
        return any(isinstance(node, _SUBSTANCE) for node in tree.body) or any(calls)
    return False


def _meaning(name: str, code: str) -> int:
    kinds = [kind for kind, _ in get_lexer_by_name(name).get_tokens(code)]
    found = sum(any(kind in meaning for meaning in _MEANING) for kind in kinds)
    return found - 3 * sum(kind in Error or kind is Token.Error for kind in kinds)
