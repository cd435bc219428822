"""What the compiler makes of the kernels: the operations that are written, for whatever machine."""

import importlib.util
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest

from shoal.protocol import kernels, outer_kernels, sparse_kernels
from shoal.protocol.aggregators import AGGREGATORS, WeightedPart
from shoal.protocol.codecs import CHUNK_ELEMENTS, CODECS, encode_with_feedback
from shoal.protocol.outer_step import OUTER_OPTIMIZERS, OuterRates

# Multiplications and additions in one instruction, with one rounding; reciprocals and estimates in place of divisions.
FUSED = {
    "x86_64": re.compile(r"\bv?f(n?)m(add|sub)\w*|\bv?rcp\w*|\bv?rsqrt\w*"),
    "aarch64": re.compile(r"\bf(n?)m(add|sub|la|ls)\b|\bfrecp\w*|\bfrsqrt\w*"),
}
# Both can fuse.
MACHINES = {"x86_64": ("x86-64-v3", "+fma,+avx2"), "aarch64": ("cortex-a72", "+neon")}
LICENCES = re.compile(r"\b(fast|contract|reassoc|arcp|afn|nnan|ninf|nsz)\b")


NJIT = numba.njit
MODULES = (kernels, sparse_kernels, outer_kernels)


def run_all() -> None:
    """Call every kernel, so that it is known for which types each is compiled."""
    values = np.linspace(-1, 1, CHUNK_ELEMENTS + 3, dtype=np.float32)
    residual, params, momentum = np.zeros_like(values), values.copy(), np.zeros_like(values)
    for codec in CODECS.values():
        encoded = encode_with_feedback(codec, values, residual, np.empty_like(values))
        codec.decode_untrusted(encoded, values.size, np.empty_like(values))
        for aggregator in AGGREGATORS.values():
            aggregator.aggregate(codec, [WeightedPart(encoded=encoded, weight=1.0)], np.empty_like(values))
    for optimizer in OUTER_OPTIMIZERS.values():
        optimizer.apply(params, momentum, values, OuterRates(learning_rate=0.7, momentum=0.9))


def find_kernels(module: ModuleType) -> dict[str, Any]:
    return {name: kernel for name, kernel in vars(module).items() if hasattr(kernel, "inspect_llvm")}


def load_anew(module: ModuleType, njit: Callable[..., Any]) -> ModuleType:
    """The module once more, compiled by this function."""
    spec = importlib.util.spec_from_file_location("kernels_anew", module.__file__)
    assert spec is not None and spec.loader is not None
    anew = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numba, "njit", njit)
        spec.loader.exec_module(anew)
    return anew


def compile_all() -> Iterator[tuple[str, str]]:
    """Every kernel's name and LLVM code for each set of types; made anew, for what comes from a file has no text."""
    run_all()
    for module in MODULES:
        anew = load_anew(module, lambda cache=False, **settings: NJIT(**settings))
        for name, kernel in find_kernels(module).items():
            fresh = getattr(anew, name)
            for signature in kernel.signatures:
                fresh.compile(signature)
                yield name, fresh.inspect_llvm(signature)


@pytest.fixture(scope="module")
def code() -> list[tuple[str, str]]:
    return list(compile_all())


def test_every_kernel_is_looked_at(code: list[tuple[str, str]]) -> None:
    # What has a leading underscore is part of its callers' code.
    kernels_of_all = {name for module in MODULES for name in find_kernels(module)}
    assert {name for name, _ in code if name[0] != "_"} == {name for name in kernels_of_all if name[0] != "_"}


def test_the_compiler_has_no_licence_to_change_arithmetic(code: list[tuple[str, str]]) -> None:
    arithmetic = [
        (name, line.strip())
        for name, text in code
        for line in text.splitlines()
        if re.search(r"= (tail )?(fadd|fsub|fmul|fdiv|call)\b", line)
    ]
    assert any(" fdiv " in f" {line} " for _, line in arithmetic)
    assert [one for one in arithmetic if LICENCES.search(one[1].split("@")[0])] == []
    assert [one for one in arithmetic if "fmuladd" in one[1] or "llvm.fma." in one[1]] == []


def assemble(machine: str, text: str) -> str:
    """What a processor of this kind gets to do."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple(f"{machine}-unknown-linux-gnu")
    cpu, features = MACHINES[machine]
    backend: Any = target.create_target_machine(opt=3, cpu=cpu, features=features)
    text = re.sub(r'^target (triple|datalayout) = .*$|"target-(cpu|features)"="[^"]*"', "", text, flags=re.M)
    # Only counts of references, around the kernel, are for one kind of processor alone.
    text = re.sub(r"(tail )?call i8 @llvm\.x86\.atomic[^\n]*", "add i8 0, 0", text)
    module = llvm.parse_assembly(text)
    module.triple, module.data_layout = f"{machine}-unknown-linux-gnu", str(backend.target_data)
    return str(backend.emit_assembly(module))


@pytest.mark.parametrize("machine", FUSED)
def test_no_instruction_rounds_once_for_two_operations(machine: str, code: list[tuple[str, str]]) -> None:
    fused = {name: found for name, text in code if (found := FUSED[machine].findall(assemble(machine, text)))}
    assert fused == {}


@pytest.mark.parametrize("machine", FUSED)
def test_one_that_does_would_be_found(machine: str, code: list[tuple[str, str]]) -> None:
    text = dict(code)["add_scaled"]
    licensed = re.sub(r" (fmul|fadd) ", r" \1 contract ", text)
    assert FUSED[machine].search(assemble(machine, licensed))


def test_where_nothing_can_be_kept_kernels_are_compiled_all_the_same() -> None:
    def njit(cache: bool = False, **settings: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return NJIT(**settings)

    assert load_anew(kernels, njit).peak_bits(np.array([1.0, -2.0], np.float32).view(np.uint32)) == 0x40000000
