"""Ask schedule rules one by one about a function, and find out where in its own source a rule said no.

A rule declines by returning None and says nothing more. Python can tell where: while a rule runs, a trace function
(sys.settrace) notes, for frames of the rules' packages alone, the line each call returned from. The line's enclosing
`if` is the condition that failed, and a call in that condition that returned None is followed in turn; so is one that
raised what the rule then caught.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Where rules are written. Anything else that they call (TVM's compiler, its FFI) is left alone.
RULE_PACKAGES = ("/dlight/", "/gpt2_tvm/schedules/")
DEPTH = 4  # calls that are followed from a rule's `apply` towards the reason

ACCEPTED, DECLINED, RAISED = "accepted", "declined", "raised"


@dataclass(frozen=True)
class Place:
    """Where a rule returned None: a line of a source file, and the condition that led there."""

    file: str
    line: int
    function: str
    condition: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}: {self.condition}"


@dataclass(frozen=True)
class Answer:
    """What one rule says about one function.

    outcome: accepted, declined or raised. asked: whether the compiler asked it (no earlier rule took the function).
    places: where it declined, outermost first. error: of a rule that raised. schedule: of one that accepted
    (`s_tir.Schedule`). reason: why it declined, in words (`reasons.py`).
    """

    rule: str
    outcome: str
    asked: bool
    places: tuple[Place, ...] = ()
    error: str = ""
    schedule: Any = field(default=None, compare=False, repr=False)
    reason: str = ""

    @property
    def won(self) -> bool:
        """Whether this rule took the function: the first that accepted."""
        return self.asked and self.outcome == ACCEPTED


def ask(func: Any, rules: Sequence[tuple[str, Any]], target: Any) -> list[Answer]:
    """The answers of `rules` (name, rule), in order, about the unscheduled PrimFunc `func`.

    Rules after the one that accepts are asked too, which the compiler does not do: it shows which rules overlap. What a
    rule raises is an answer as well; one that hangs or ends the process is not guarded against here.
    """
    answers: list[Answer] = []
    for name, rule in rules:
        asked = not any(answer.won for answer in answers)
        with _Watch() as watch:
            try:
                with target:
                    result = rule.apply(func, target, False)
            except Exception as error:
                first = (str(error).strip().splitlines() or [""])[-1].strip()
                answers.append(Answer(name, RAISED, asked, error=f"{type(error).__name__}: {first}"[:300]))
                continue
        if result is None:
            answers.append(Answer(name, DECLINED, asked, places=tuple(watch.places())))
        else:
            schedule = result[0] if isinstance(result, (list, tuple)) else result
            answers.append(Answer(name, ACCEPTED, asked, schedule=schedule))
    return answers


@dataclass
class _Call:
    """A call of a function of the rules' packages. line: in it, of its return. caller_line: where it was called."""

    file: str
    function: str
    first_line: int
    caller_line: int
    line: int = 0
    value: Any = ...
    error: str = ""
    error_line: int = 0
    calls: list[_Call] = field(default_factory=list)

    @property
    def raised(self) -> bool:
        """Whether it ended with the exception; Python reports that as a return of None from the line that raised."""
        return bool(self.error) and self.value is None and self.line == self.error_line


class _Watch:
    """Collects the tree of calls among the rules' own functions while it is entered; restores the tracer before."""

    def __init__(self) -> None:
        self.root = _Call("", "", 0, 0)
        self._stack: list[tuple[Any, _Call]] = []

    def __enter__(self) -> _Watch:
        self._before = sys.gettrace()
        sys.settrace(self._global)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(self._before)

    def _global(self, frame: Any, event: str, _: Any) -> Any:
        code = frame.f_code
        path = code.co_filename.replace("\\", "/")
        if event != "call" or not any(package in path for package in RULE_PACKAGES):
            return None
        parent = self._stack[-1][1] if self._stack else self.root
        caller = frame.f_back
        call = _Call(code.co_filename, code.co_name, code.co_firstlineno, caller.f_lineno if caller else 0)
        parent.calls.append(call)
        self._stack.append((frame, call))
        frame.f_trace_lines = False

        def local(frame: Any, event: str, argument: Any) -> Any:
            if event == "exception":
                call.error, call.error_line = f"{argument[0].__name__}: {argument[1]}", frame.f_lineno
            elif event == "return":
                call.line = frame.f_lineno
                call.value = argument if argument is None or isinstance(argument, (bool, tuple)) else ...
                while self._stack and self._stack.pop()[0] is not frame:
                    pass
            return local

        return local

    def places(self) -> Iterator[Place]:
        """From the rule's `apply` inwards: each place that returned None (or False) because of the next."""
        call = next((c for c in reversed(self.root.calls) if c.value is None), None)
        for _ in range(DEPTH):
            if call is None:
                return
            condition, lines = _condition(call)
            if condition:
                yield Place(_short(call.file), call.line, call.function, condition)
            call = next((c for c in reversed(call.calls) if c.caller_line in lines and _is_no(c.value)), None)


def _is_no(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, tuple) and bool(value) and value[0] is None)


def _short(file: str) -> str:
    """A file's path from its package on, which says nothing about the machine."""
    parts = Path(file).parts
    for package in ("tvm", "gpt2_tvm"):
        if package in parts:
            return "/".join(parts[len(parts) - 1 - parts[::-1].index(package) :])
    return parts[-1]


@functools.lru_cache(maxsize=64)
def _tree(file: str) -> ast.Module:
    return ast.parse(Path(file).read_text(encoding="utf-8"))


def _condition(call: _Call) -> tuple[str, set[int]]:
    """The condition under which `call` returned where it did, and the lines whose calls decided it.

    "" and the return's own lines where it hands on what another function returned.
    """
    function = next(
        (
            node
            for node in ast.walk(_tree(call.file))
            if isinstance(node, ast.FunctionDef)
            and node.name == call.function
            and min([node.lineno, *(d.lineno for d in node.decorator_list)]) <= call.first_line <= node.lineno
        ),
        None,
    )
    if function is None:
        return "", set()
    path = _path_to(function, call.line)
    leaf = path[-1]
    if call.raised:
        return _failure(call, leaf), _lines(leaf)
    if isinstance(leaf, ast.Return) and isinstance(leaf.value, ast.Call):
        return "", _lines(leaf)
    for parent, child in zip(path[-2::-1], path[:0:-1], strict=False):
        if isinstance(parent, ast.ExceptHandler):
            failed = _path_to(function, call.error_line)[-1]
            return _failure(call, failed), _lines(failed)
        if isinstance(parent, ast.If):
            negative = child in parent.orelse
            text = ast.unparse(parent.test)
            names = {node.id for node in ast.walk(parent.test) if isinstance(node, ast.Name)}
            lines = _lines(parent.test) | _assignments(function, names, parent.lineno)
            return (f"not ({text})" if negative else text), lines
    return ("returned None", set()) if leaf is function else (ast.unparse(leaf).splitlines()[0], _lines(leaf))


def _failure(call: _Call, statement: Any) -> str:
    """What was raised, and by which statement."""
    return f"{_first_line(call.error).rstrip(': ')} at {ast.unparse(statement).splitlines()[0]}"


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["an error"])[0][:160]


def _lines(node: Any) -> set[int]:
    return set(range(node.lineno, node.end_lineno + 1))


def _assignments(function: ast.FunctionDef, names: set[str], before: int) -> set[int]:
    """Lines of the last assignment, before a line, to each of these names."""
    last: dict[str, set[int]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and node.lineno < before:
            for target in node.targets:
                for name in ast.walk(target):
                    newer = isinstance(name, ast.Name) and name.id in names
                    if newer and (name.id not in last or node.lineno > min(last[name.id])):  # type: ignore[attr-defined]
                        last[name.id] = _lines(node)  # type: ignore[attr-defined]
    return set().union(*last.values()) if last else set()


def _path_to(root: Any, line: int) -> list[Any]:
    """The statements from `root` down to the one at `line`."""
    path = [root]
    while True:
        inside = [
            child
            for child in ast.iter_child_nodes(path[-1])
            if isinstance(child, (ast.stmt, ast.ExceptHandler)) and child.lineno <= line <= (child.end_lineno or 0)
        ]
        if not inside:
            return path
        path.append(inside[-1])
