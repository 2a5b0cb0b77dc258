"""Renders chat templates in a process of its own, which :mod:`spin.data.templates` starts and talks to in JSON lines.

A template is somebody's program. Only a process can be limited in time and memory whatever the program does, so it runs
here: at most ``CPU_SECONDS`` of processor time and ``MAX_CHARS`` characters for one conversation, ``MEMORY_BYTES`` in
all. Imports the standard library and jinja2, nothing else: it starts in a tenth of a second.

The environment is the one that transformers gives to chat templates: whitespace of blocks trimmed, ``break`` and
``continue``, ``{% generation %}``, ``tojson`` without HTML escapes, ``raise_exception`` and ``strftime_now``.

Source: https://huggingface.co/docs/transformers/chat_templating_writing
"""

from __future__ import annotations

import functools
import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 4
MAX_CHARS = 1 << 25
MEMORY_BYTES = 1 << 30
CLOCK = "strftime_now"


class _Generation(Extension):
    """``{% generation %}...{% endgeneration %}`` marks what the assistant writes; here it renders as it stands."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
)
_ENVIRONMENT.filters["tojson"] = _tojson
_ENVIRONMENT.globals["raise_exception"] = _raise_exception


@functools.lru_cache(maxsize=16)
def _compiled(text: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(text)


def _names(text: str) -> list[str]:
    """The variables that a template reads before it sets them; jinja2 also lists those that a branch alone sets."""
    tree = _ENVIRONMENT.parse(text)
    is_set: dict[str, bool] = {}
    for node in tree.find_all((nodes.Assign, nodes.Name)):
        # the value of an assignment is read before its target is set
        for name in (node.node, *node.node.find_all(nodes.Name)) if isinstance(node, nodes.Assign) else (node,):
            if isinstance(name, nodes.Name):
                is_set.setdefault(name.name, name.ctx != "load")
    return sorted(name for name in meta.find_undeclared_variables(tree) if not is_set[name])


def _render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    chunks, chars = [], 0
    for chunk in template.generate(**variables):
        chars += len(chunk)
        if chars > MAX_CHARS:
            raise MemoryError
        chunks.append(chunk)
    return "".join(chunks)


def _limited(function: Any, *arguments: Any) -> dict[str, Any]:
    """What a function gives, or what it raises, in JSON values. The process dies of a function that takes too long."""
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        return {"value": function(*arguments)}
    except MemoryError:
        return {"kind": "limit", "message": f"writes more than {MAX_CHARS:,} characters or fills the memory"}
    except jinja2.TemplateSyntaxError as error:
        return {"kind": "syntax", "message": str(error.message), "line": error.lineno}
    except jinja2.TemplateError as error:
        return {"kind": "refused", "message": str(error)}
    except Exception as error:  # noqa: BLE001 - whatever somebody's program raises
        return {"kind": "failed", "message": f"{type(error).__name__}: {error}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def serve(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Serves one request: ``template``, and either no more, which asks for the names that it reads, or
    ``conversations`` (variables of each), ``variables`` (of all) and ``date`` (ISO), the day of its clock. Gives a
    ``value``, or ``kind`` and ``message`` of a fault: of each conversation, or of the names."""
    text = request["template"]
    if "conversations" not in request:
        return [_limited(_names, text)]
    compiled = _limited(_compiled, text)
    if "kind" in compiled:
        return [compiled] * len(request["conversations"])
    shared = request["variables"] | {CLOCK: datetime.fromisoformat(request["date"]).strftime}
    return [_limited(_render, compiled["value"], shared | own) for own in request["conversations"]]


def main() -> None:
    """Serves requests from stdin until it ends."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    memory = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (memory, hard))
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
