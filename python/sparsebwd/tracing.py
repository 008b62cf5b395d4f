# SPDX-License-Identifier: Apache-2.0
"""Symbolic tracing by torch.fx of a model in use: nothing of it, and nothing outside of it, changes meanwhile.

:func:`torch.fx.symbolic_trace` patches ``nn.Module.__call__`` and ``__getattr__`` for the whole process while it runs,
which other threads meet. Here a copy of the model is traced, and calls are caught in the modules of the copy.
"""

from __future__ import annotations

import copy
import dis
import inspect
import logging
import math
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from functools import cached_property, lru_cache, partial
from itertools import islice
from random import Random
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import fx, nn
from torch.fx import _symbolic_trace
from torch.fx.proxy import TraceError
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .subclasses import CatchConvolution, forward_to_follow
from .symbolic import symbolic

log = logging.getLogger("sparsebwd")

_OF_MODULES = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


class Tracer(fx.Tracer):
    """The graph of a model in training mode, in which every convolution is one node, and so is every module that does not trace.

    ``graph`` is None if the forward of ``root`` does not trace. Names are those of ``root.named_modules()``;
    ``opaque`` has those of the modules that do not trace, ``root`` itself ("") included. Of a layer of a registered
    subclass of nn.Conv2d, the node is the convolution, with what its forward does before and after around it; it is the whole
    layer where that does not trace, which ``untraced`` names.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__(autowrap_modules=())
        self.opaque: set[str] = set()
        self.untraced: set[str] = set()
        self.graph: fx.Graph | None = fx.Graph(tracer_cls=type(self))
        self.tensor_attrs = {}
        self._functions: dict[type, FunctionType | str] = {}
        try:
            self.root = self._shadow(root, {})
            self.submodule_paths = {module: name for name, module in self.root.named_modules()}
            # What would need an argument that is not traced cannot be the root.
            function, args = self.create_args_for_root(self._function(self.root), True)
            with _NoRandomNumbers():
                self.create_node("output", "output", (self.create_arg(function(*args)),), {})
        except Exception as error:  # forward() is the user's code on symbolic values: it may raise anything
            self._is_opaque("", root, error)
            self.graph = None

    def _is_opaque(self, name: str, module: nn.Module, error: Exception) -> None:
        log.debug("torch.fx does not trace %s %r: %s", type(module).__name__, name, error)
        self.opaque.add(name)

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return isinstance(m, (_ConvNd, torch.jit.ScriptModule)) or super().is_leaf_module(m, qualified_name)

    def _call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What a module of the copy does when it is called."""
        name = self.path_of_module(module)
        registered = forward_to_follow(module) is not None
        if (registered or not self.is_leaf_module(module, name)) and name not in self.opaque | self.untraced:
            last = next(iter(reversed(self.graph.nodes)))
            try:
                with self._convolution_of(module, name) if registered else nullcontext():
                    return self._function(module)(module, *args, **kwargs)
            except Exception as error:
                if registered:
                    self.untraced.add(name)
                else:
                    self._is_opaque(name, module, error)
                while (node := next(iter(reversed(self.graph.nodes)))) is not last:
                    self.graph.erase_node(node)
        return self.create_proxy("call_module", name, args, kwargs)

    def _convolution_of(self, layer: nn.Conv2d, name: str) -> CatchConvolution:
        def node(input: fx.Proxy, *args: Any, **kwargs: Any) -> fx.Proxy:
            return self.create_proxy("call_module", name, (input,), {})

        return CatchConvolution(layer, node)

    def _function(self, module: nn.Module) -> Callable:
        """The forward function of ``module``, as it is to be traced. Raises if it is not to be."""
        cls = type(module)
        own = {name: value for name, value in vars(module).items() if name not in _OF_MODULES and _is_own(value)}
        if "forward" in vars(module):
            bound = vars(module)["forward"]
            if not (isinstance(bound, MethodType) and bound.__self__ is module):
                raise TraceError("its forward is overridden on the instance")
            found = self._fit(bound.__func__, cls, own)
        elif own:
            found = self._fit(forward_to_follow(module) or cls.forward, cls, own)
        else:
            if cls not in self._functions:
                self._functions[cls] = self._fit(forward_to_follow(module) or cls.forward, cls, own)
            found = self._functions[cls]
        if isinstance(found, str):
            raise TraceError(found)
        return found

    @staticmethod
    def _fit(forward: Callable, cls: type, own: dict[str, Callable]) -> Callable | str:
        """``forward`` as it is to be traced, or why it is not to be."""
        return _unfit(forward, cls, own) or _with_symbolic_globals(forward)

    def _shadow(self, module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
        """A copy of the module tree to trace, with empty meta tensors and no hooks.

        Tracing runs forward(); on a copy, whatever forward() stores in the model, or a hook does, leaves no mark.
        """
        if id(module) in made:
            return made[id(module)]
        if isinstance(module, torch.jit.ScriptModule):
            twin = made[id(module)] = nn.Identity()  # it is called, never looked into
        else:
            twin = made[id(module)] = object.__new__(type(module))
            state = {name: _copied(value, module, twin) for name, value in vars(module).items()}
            for key in state:
                if key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
                    state[key] = OrderedDict()
            state["_parameters"] = {
                name: None if parameter is None else nn.Parameter(_meta(parameter), requires_grad=False)
                for name, parameter in module._parameters.items()
            }
            state["_buffers"] = {name: None if b is None else _meta(b) for name, b in module._buffers.items()}
            state["_modules"] = {k: None if m is None else self._shadow(m, made) for k, m in module._modules.items()}
            state["training"] = True  # gradients are pruned in training mode only
            vars(twin).update(state)
        # Module.__call__ looks here first: it is where compiled modules keep what to call.
        vars(twin)["_compiled_call_impl"] = partial(self._call, twin)
        return twin


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    size = () if nn.parameter.is_lazy(tensor) else tensor.size()
    return torch.empty(size, dtype=tensor.dtype, device="meta")


def _copied(value: Any, module: nn.Module, twin: nn.Module) -> Any:
    """An attribute of ``module`` for its ``twin``, which may change it."""
    if isinstance(value, torch.Tensor):
        return _meta(value)
    if isinstance(value, (list, dict, set, deque)):
        return copy.copy(value)
    if isinstance(value, torch.Generator):
        return value.clone_state()
    if isinstance(value, Random) or type(value).__module__.startswith("numpy.random"):
        return copy.deepcopy(value)
    if isinstance(value, MethodType) and value.__self__ is module:
        return MethodType(value.__func__, twin)
    return value


class _NoRandomNumbers(TorchDispatchMode):
    """In this thread, operators that would draw from a generator raise, unless they only would on the meta device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
            devices = {tensor.device.type for tensor in tensors} or {torch.device(kwargs.get("device") or "cpu").type}
            if devices != {"meta"}:
                raise TraceError(f"it draws random numbers: {func}")
        return func(*args, **kwargs)


# ---- what forward functions refer to


def _code_names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code_names(constant)


@lru_cache(maxsize=4096)
def _imports(code: CodeType) -> tuple[ModuleType, ...]:
    """The modules that a function imports when it is called, if they are there already."""
    names = [step.argval for step in dis.get_instructions(code) if step.opname == "IMPORT_NAME"]
    return tuple(sys.modules[name] for name in names if name in sys.modules)


def _referred(function: FunctionType, cls: type, own: dict[str, Any]) -> Iterator[Any]:
    """What ``function``, a method of ``cls``, refers to by name: globals, defaults, closures, methods, attributes of the
    instance (``own``), and what these have under the names that the function uses."""
    code = function.__code__
    names = set(_code_names(code))
    found = [function.__globals__[name] for name in names if name in function.__globals__]
    found += [*_imports(code), *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    found += [own[name] for name in names if name in own]
    # Of all bases, which super() and overridden methods reach.
    found += [vars(base)[name] for base in cls.__mro__ for name in names if name in vars(base)]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # it is empty
            found.append(cell.cell_contents)
    seen = set()
    for value in found:
        if id(value) not in seen:
            seen.add(id(value))
            yield value
            found.extend(_members(value, names))


def _members(value: Any, names: set[str]) -> Iterable[Any]:
    """What code that uses ``names`` may reach through ``value``."""
    if isinstance(value, ModuleType):
        members = [vars(value)[name] for name in names if name in vars(value)]
        # Nothing is looked for within PyTorch.
        return members if value.__name__.partition(".")[0] != "torch" else filter(_draws, members)
    if isinstance(value, (list, tuple, dict, set)):
        return list(islice(value.values() if isinstance(value, dict) else value, _MOST_MEMBERS))
    if isinstance(value, property):
        return [value.fget]
    if isinstance(value, (staticmethod, classmethod)):
        return [value.__func__]
    if isinstance(value, cached_property):
        return [value.func]
    if isinstance(value, (nn.Module, torch.Tensor, type)) or type(value).__module__.partition(".")[0] in ("torch", "builtins"):
        return []
    return [inspect.getattr_static(value, name, None) for name in names]


_MOST_MEMBERS = 1000  # of a container


def _draws(value: Any) -> bool:
    """Whether ``value`` draws from, or sets, a generator that the whole process shares, or is one, without an operator."""
    if isinstance(value, ModuleType):
        return value.__name__ in ("random", "numpy.random", "torch.random")
    if isinstance(value, FunctionType):
        return value.__module__ in ("torch.random", "torch.cuda.random")
    return _is_generator(value) or _is_generator(getattr(value, "__self__", None))


def _is_generator(value: Any) -> bool:
    return isinstance(value, (torch.Generator, Random)) or type(value).__module__.startswith("numpy.random")


def _is_own_function(value: Any) -> bool:
    """Whether it can be called and is neither PyTorch's nor built in, nor a module or a class."""
    if isinstance(value, (FunctionType, MethodType, partial)):
        return True
    if isinstance(value, (type, torch.nn.Module, torch.Tensor)) or not callable(value):
        return False
    return isinstance(vars(type(value)).get("__call__"), FunctionType) and not type(value).__module__.startswith("torch")


def _is_own(value: Any) -> bool:
    """Whether an attribute of a module may reach a generator that is not the module's own: its own are copied with it."""
    plain = (str, int, float, type(None), type, nn.Module, torch.Tensor, torch.Size, torch.dtype, torch.device)
    return not isinstance(value, plain) and not _is_generator(value)


def _unfit(forward: Callable, cls: type, own: dict[str, Callable]) -> str | None:
    """Why ``forward`` of ``cls`` is not to be run, or None. Python's and NumPy's generators can only be protected by
    not running what draws from them: another thread may draw at the same time."""
    seen, queue = set(), [forward]
    while queue:
        value = queue.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if _draws(value):
            return f"it may draw random numbers: {getattr(value, '__name__', value)}"
        if isinstance(value, partial):
            queue.append(value.func)
        elif isinstance(value, MethodType):
            queue.append(value.__func__)
        elif _is_own_function(value) and not isinstance(value, FunctionType):
            queue.append(type(value).__call__)
        if isinstance(value, FunctionType):
            if hasattr(value, "_torchdynamo_orig_callable"):
                return f"{value.__name__} is compiled"
            if value is forward or (value.__module__ or "").partition(".")[0] != "torch":
                queue.extend(_referred(value, cls, own))
    return None


_MATH = {id(value) for value in vars(math).values() if callable(value)}


def _with_symbolic_globals(function: Callable) -> Callable:
    """``function`` with globals of its own, in which the functions of math, and those that :func:`torch.fx.wrap` names,
    take symbolic values. (torch.fx puts them into the true globals.)"""
    if not isinstance(function, FunctionType):
        return function
    scope, changed = function.__globals__, {}
    for name in set(_code_names(function.__code__)):
        value = scope.get(name)
        if value is math:
            changed[name] = ModuleType("math")
            vars(changed[name]).update(
                {key: symbolic(member) if id(member) in _MATH else member for key, member in vars(math).items()}
            )
        elif value is not None and (id(value) in _MATH or (id(scope), name) in _symbolic_trace._wrapped_fns_to_patch):
            changed[name] = symbolic(value)
    if not changed:
        return function
    twin = FunctionType(
        function.__code__, {**scope, **changed}, function.__name__, function.__defaults__, function.__closure__
    )
    twin.__kwdefaults__, twin.__annotations__ = function.__kwdefaults__, function.__annotations__
    return twin
