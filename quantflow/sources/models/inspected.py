"""Files of models that PyTorch evaluates or compiles, read without running them, before PyTorch sees them.

torch.export.load hands expressions found in the file to `eval`, and resolves names in it by getattr and import.
torch.jit.load runs the `__setstate__` of the file's classes, and TorchScript has operators that write files. What is
refused here is what models never hold: an expression that is no arithmetic on sizes, a call that is no operator on
tensors.
"""

from __future__ import annotations

import ast
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from quantflow.errors import ModelError

#: Far above what a model's description needs, far below what could fill the memory.
_MAX_JSON_BYTES = 512 << 20
_MAX_EXPRESSION = 20_000
_MAX_POWER = 64
#: Functions of sympy and torch that expressions on sizes are printed with.
_FUNCTIONS = frozenset((
    "Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Max", "Min", "Mod", "PythonMod", "FloorDiv",
    "CleanDiv", "CeilDiv", "ModularIndexing", "Where", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality", "Unequality",
    "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan", "And", "Or", "Not", "Abs", "floor", "ceiling",
    "sqrt", "Identity", "CeilToInt", "FloorToInt", "TruncToInt", "TruncToFloat", "ToFloat", "RoundToInt",
    "RoundDecimal", "IntTrueDiv", "FloatTrueDiv", "FloatPow", "PowByNatural", "IsNonOverlappingAndDenseIndicator",
    "BitwiseFn_bitwise_and", "BitwiseFn_bitwise_or", "LShift", "RShift", "OpaqueUnaryFn_sqrt", "OpaqueUnaryFn_log",
    "OpaqueUnaryFn_exp",
))  # fmt: skip
_CONSTANTS = frozenset((
    "true", "false", "oo", "int_oo", "zoo", "nan", "inf", "True", "False",
))  # fmt: skip
_SYMBOL = re.compile(r"[a-z]+_?\d+|[a-z]+[a-z_0-9]*", re.IGNORECASE)
#: What a node of a graph may call besides registered operators.
_PYTHON = frozenset((
    "add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "pos", "abs", "eq", "ne", "lt", "le", "gt",
    "ge", "and_", "or_", "xor", "not_", "invert", "lshift", "rshift", "getitem",
))  # fmt: skip
_MATH = frozenset((
    "ceil", "floor", "trunc", "sqrt", "log", "log2", "exp", "sin", "cos", "tan",
))  # fmt: skip
#: A size of an input, as conditions name it.
_INPUT = re.compile(r"L\['\w+'\](?:\['\w+'\]|\[\d+\]|\.\w+(?!\())*(?:\.size\(\)\[\d+\]|\.stride\(\)\[\d+\])?")
_OPERATOR = re.compile(r"torch\.ops\.(\w+)\.(\w+)(?:\.(\w+))?")
_SIZES = re.compile(r"torch\._?sym_\w+")
#: Libraries of PyTorch and its own packages whose operators reach files, devices or other processes.
_REACHING = frozenset((
    "image", "video_reader", "io", "rpc", "dist_autograd", "c10d", "_c10d_functional", "c10d_functional",
    "symm_mem", "profiler", "inductor", "_inductor_test", "streams", "torchaudio", "sox_io", "debugprims",
    "static_runtime", "aoti_torch",
))  # fmt: skip
#: ATen's and TorchScript's own operators that do.
_WRITING = frozenset((
    "save", "from_file", "_save", "load", "_load_for_lite_interpreter", "open", "file", "fork", "wait", "awaitable",
    "rpc_async", "rpc_sync", "rpc_remote", "_print", "set_data",
))  # fmt: skip


def check_exported(path: Path) -> None:
    """An ExportedProgram's file.

    Raises:
        ModelError: it holds compiled code, an expression that is not arithmetic on sizes, or a call of something else
            than an operator on tensors; names it.
    """
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            parts = info.filename.split("/")
            if info.filename.endswith((".so", ".cubin", ".ptx", ".o", ".dll")) or "aotinductor" in parts:
                raise _refused(path, f"compiled code ('{info.filename}')")
            if not info.filename.endswith(".json"):
                continue
            if info.file_size > _MAX_JSON_BYTES:
                raise _refused(path, f"'{info.filename}' of {info.file_size} bytes")
            try:
                content = json.loads(archive.read(info))
            except (ValueError, RecursionError) as error:
                raise _refused(path, f"'{info.filename}', which is no JSON ({type(error).__name__})") from error
            for reason in _reasons(content):
                raise _refused(path, reason)


def _refused(path: Path, what: str) -> ModelError:
    return ModelError(f"model.path: {path} holds {what}, which an exported model does not; it is not loaded")


def _reasons(content: Any) -> Iterator[str]:
    """What is wrong with the description of a model, piece by piece."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from _of_entry(key, item)
                waiting.append(item)
        elif isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            # A structure, written as JSON inside: it may name an enum, whose module would be imported.
            try:
                waiting.append(json.loads(value))
            except (ValueError, RecursionError):
                continue


def _of_entry(key: str, item: Any) -> Iterator[str]:
    if key == "__enum__":
        yield "the name of a Python class to import"
    elif key == "expr_str" and isinstance(item, str):
        yield from _of_expression(item)
    elif key == "range_constraints" and isinstance(item, dict):
        for expression in item:
            yield from _of_expression(expression)
    elif key == "guards_code" and isinstance(item, list):
        for expression in item:
            yield from _of_guard(expression)
    elif key in ("target", "as_operator") and isinstance(item, str):
        if not is_operator(item):
            yield f"a call of '{item[:80]}'"
    elif key == "as_custom_obj" and item is not None:
        yield "an object of its own"


def _of_expression(text: Any) -> Iterator[str]:
    if not is_arithmetic(text):
        yield f"the expression '{str(text)[:80]}'"


def _of_guard(text: Any) -> Iterator[str]:
    """Conditions on the inputs' sizes, as in L['x'].size()[0] <= 8."""
    if not isinstance(text, str):
        return
    plain = re.sub(
        r"L\['\w+'\](?:\['\w+'\]|\[\d+\]|\.\w+(?!\())*(?:\.size\(\)\[\d+\]|\.stride\(\)\[\d+\])?", "s0", text
    )
    if not is_arithmetic(plain):
        yield f"the condition '{text[:80]}'"


def is_arithmetic(text: Any) -> bool:
    """Whether an expression holds nothing but numbers, names of sizes, arithmetic, comparisons and known functions."""
    if not isinstance(text, str) or len(text) > _MAX_EXPRESSION:
        return False
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    try:
        return _is_size(tree.body)
    except RecursionError:
        return False


def _is_size(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value=bool() | int() | float() as value):
            return isinstance(value, float) or abs(value) < 1 << 64
        case ast.Name(id=name):
            return name in _CONSTANTS or (_SYMBOL.fullmatch(name) is not None and name.rstrip("0123456789") != name)
        case ast.UnaryOp(operand=operand):
            return _is_size(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _is_size(left) and _is_small(right)
        case ast.BinOp(left=left, right=right):
            return _is_size(left) and _is_size(right)
        case ast.BoolOp(values=values):
            return all(map(_is_size, values))
        case ast.Compare(left=left, comparators=others):
            return all(map(_is_size, (left, *others)))
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str() as name)], keywords=keywords):
            flags = all(isinstance(k.value, ast.Constant) and isinstance(k.value.value, bool) for k in keywords)
            return flags and name.isidentifier()
        case ast.Call(func=ast.Name(id="Float"), args=[ast.Constant(value=str() as number), *rest], keywords=keywords):
            precise = all(isinstance(k.value, ast.Constant) and isinstance(k.value.value, int) for k in keywords)
            return re.fullmatch(r"[-+.\deE]{1,400}", number) is not None and precise and all(map(_is_size, rest))
        case ast.Call(func=ast.Name(id="Pow" | "PowByNatural" | "FloatPow"), args=[base, power], keywords=[]):
            return _is_size(base) and _is_small(power)
        case ast.Call(func=ast.Name(id="LShift" | "RShift"), args=[base, power], keywords=[]):
            return _is_size(base) and _is_small(power)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in _FUNCTIONS:
            flags = all(isinstance(k.value, ast.Constant) and isinstance(k.value.value, bool) for k in keywords)
            return flags and all(map(_is_size, args))
    return False


def _is_small(node: ast.AST) -> bool:
    """An exponent: a small number, so that no power takes all time and memory."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return abs(value) <= _MAX_POWER
        case ast.UnaryOp(operand=operand):
            return _is_small(operand)
        case ast.Call(func=ast.Name(id="Integer" | "Rational" | "Float"), args=args):
            return all(map(_is_small, args))
    return False


def is_operator(target: str) -> bool:
    """Whether what a node calls is an operator on tensors, or arithmetic on sizes."""
    module, _, name = target.rpartition(".")
    if module in ("_operator", "operator"):
        return name in _PYTHON
    if module == "math":
        return name in _MATH
    if _SIZES.fullmatch(target) or target in ("torch._C._set_grad_enabled", "torch._check"):
        return True
    found = _OPERATOR.fullmatch(target)
    return found is not None and _is_harmless(found[1], found[2])


def _is_harmless(library: str, name: str) -> bool:
    if library in _REACHING:
        return False
    return library not in ("aten", "prim") or name not in _WRITING


#: The words of a TorchScript file; strings and comments are none.
_TOKENS = re.compile(
    r"""(?P<skip>\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*'|\#[^\n]*|\s+|\\)|(?P<word>[A-Za-z_]\w*)|(?P<other>.)""",
    re.DOTALL,
)
#: What reaches beyond tensors as a method of whatever object, or as a function of the language.
_METHODS = frozenset(("save", "from_file", "rpc_async", "rpc_sync", "rpc_remote", "set_data"))
_KEYWORDS = frozenset(("fork", "rpc_async", "rpc_sync", "rpc_remote", "awaitable", "open"))


def check_script(path: Path) -> None:
    """A ScriptModule's file: its code is text, and calls operators by name.

    Raises:
        ModelError: it is not a zip file of torch.jit.save, or its code calls what reaches files, devices or processes.
    """
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.filename.endswith(".py"):
                continue
            if info.file_size > _MAX_JSON_BYTES:
                raise _refused_script(path, f"'{info.filename}' of {info.file_size} bytes")
            code = archive.read(info).decode("utf-8", errors="replace")
            if reached := _reached(code):
                raise _refused_script(path, f"a call of {reached}")


def _reached(code: str) -> str:
    """What reaches beyond tensors, as the code names it; '' if nothing does."""
    words = [found[0] for found in _TOKENS.finditer(code) if not found["skip"]]
    for at, word in enumerate(words):
        before = words[max(0, at - 4) : at]
        if before[-1:] != ["."]:
            if word in _KEYWORDS and words[at + 1 : at + 2] == ["("]:
                return word
            continue
        chain = before[-4:] if before[-4:-2] == ["ops", "."] else before[-2:]
        if word in _METHODS:
            return f"{before[-2] if len(before) > 1 else ''}.{word}"
        if chain[:1] == ["ops"] and len(chain) == 2 and word in _REACHING:
            return f"ops.{word}"
        library = chain[2] if len(chain) == 4 else "aten"
        if chain[0] in ("ops", torch.__name__) and not _is_harmless(library, word):
            return f"{chain[0]}.{word}"
    return ""


def _refused_script(path: Path, what: str) -> ModelError:
    return ModelError(
        f"model.path: {path} holds {what}, which reaches beyond its tensors (files, devices, other processes); "
        "it is not loaded"
    )
