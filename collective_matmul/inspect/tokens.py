"""The small grammar of one line of HLO text: operands in parentheses, then attributes.

    %sum = f32[8]{0} add(f32[8]{0} %a, f32[8]{0} %b), metadata={op_name="x"}

An attribute's value may hold brackets of all kinds, and strings with brackets in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_COMMENT = re.compile(r"/\*.*?\*/")
_KEY = re.compile(r"[, ]*([\w\-]+)=")
# A whole string, a whole group of groups without strings, or one bracket or comma: nothing in a
# list of a thousand pairs is looked at twice.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\{(?:[^{}"]|\{[^{}"]*\})*\}|[{}\[\]()]|,')
_PARENTHESIS = re.compile(r'"(?:[^"\\]|\\.)*"|[()]')


def closing(line: str, start: int) -> int:
    """Where the parenthesis that opens just before `start` closes; strings do not count."""
    end = line.find(")", start)
    if line.find("(", start, end) < 0 and line.find('"', start, end) < 0:
        return end
    depth = 1
    for found in _PARENTHESIS.finditer(line, start):
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        if depth == 0:
            return found.start()
    return len(line)


def operand_names(argument: str) -> tuple[str, ...]:
    """The names in a list such as `%a, f32[2]{0} %b, /*index=5*/%c`, without per cent signs."""
    argument = _COMMENT.sub("", argument)
    if "%" in argument:
        return tuple(re.findall(r"%([^\s,)]+)", argument))
    # Short texts write neither per cent signs nor types.
    return tuple(part.split()[-1] for part in argument.split(",") if part.strip())


def split_attributes(rest: str) -> Iterator[tuple[str, str]]:
    """(name, text of the value) of each of `, dimensions={0}, metadata={op_name="a, b=c"}`."""
    position = 0
    while key := _KEY.match(rest, position):
        depth = 0
        start = position = key.end()
        for token in _TOKEN.finditer(rest, start):
            position = token.start()
            if token[0] == "," and depth == 0:
                break
            depth += {"{": 1, "[": 1, "(": 1, "}": -1, "]": -1, ")": -1}.get(token[0], 0)
            position = token.end()
        else:
            position = len(rest)
        yield key[1], rest[start:position].strip()
