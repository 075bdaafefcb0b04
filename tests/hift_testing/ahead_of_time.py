"""Compiles the fused kernels for GPUs that are not there and reads what the compiler made of them.

Run as a program, without TRITON_INTERPRET (an interpreting process cannot compile): prints JSON, one entry per case and
architecture. Without arguments the first case of each kernel and form for one architecture, its accesses read off PTX;
with `all` everything, and read off the machine code, which takes longer than to compile.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 86, 89, 90)
WIDTHS = (64, 128)
POINTERS = {
    "exp_avg_ptr": "fp32", "exp_avg_sq_ptr": "fp32", "momentum_ptr": "fp32", "sum_ptr": "fp32", "scalars_ptr": "fp32",
    "partial_ptr": "fp64", "result_ptr": "fp64", "square_ptr": "fp64", "divisor_ptr": "fp64",
    "code1_ptr": "u8", "code2_ptr": "u8", "scale1_ptr": "fp32", "scale2_ptr": "fp32",
    "row_ptr": "fp32", "col_ptr": "fp32", "mean_ptr": "fp32", "variance_ptr": "fp32", "coefficient_ptr": "fp32",
    "row_partial_ptr": "fp64", "col_partial_ptr": "fp64",
}  # fmt: skip
ALIGNED = ("numel", "start", "skip", "num_rows", "num_columns", "length")  # integers that 16 divides
INTEGERS = (*ALIGNED, "seed", "index", "num_partials", "num_batches", "row_blocks", "col_blocks")
# What is not the elementwise kernels': warps and constexprs, as the launchers give them.
LAUNCHES: dict[str, tuple[int, dict[str, Any]]] = {
    "_sum_of_squares_kernel": (8, {"TILE": 2048}), "_finish_kernel": (8, {"TILE": 1024}), "_prepare_kernel": (1, {}),
    "_weight_square_kernel": (8, {"TILE": 2048}), "_update_square_kernel": (8, {"TILE": 2048}),
    "_add_partials_kernel": (4, {"TILE": 256}),
}  # fmt: skip
# form -> MASTER, dtype of weight_ptr, dtype of master_ptr
FORMS = {
    "plain": (0, "fp32", "fp32"), "fp32": (1, "bf16", "fp32"), "split16": (2, "bf16", "i16"),
    "none": (3, "bf16", "bf16"),
}  # fmt: skip


def cases() -> dict[str, tuple[str, str, dict[str, Any], dict[str, str], tuple[int, ...]]]:
    """name -> (module, kernel, constexprs, pointer dtypes, architectures)."""
    found: dict[str, Any] = {}
    rules = {
        "adamw": ("_adamw_kernel", {"DECOUPLED": True}),
        "sgd": ("_sgd_kernel", {"MOMENTUM": True, "NESTEROV": False}),
        "lion": ("_lion_kernel", {}),
        "adagrad": ("_adagrad_kernel", {}),
    }
    for rule, (kernel, constexprs) in rules.items():
        for form, (master, weight, second) in FORMS.items():
            # Every architecture for the forms that most runs use, one for the rest.
            archs = ARCHITECTURES if form in ("fp32", "split16") and rule == "adamw" else (86,)
            pointers = {"grad_ptr": "bf16", "weight_ptr": weight, "master_ptr": second}
            found[f"{rule}-{form}"] = (rule, kernel, {**constexprs, "MASTER": master}, pointers, archs)
    bf16_moments = {"exp_avg_ptr": "bf16", "exp_avg_sq_ptr": "bf16"}
    for grad in ("fp16", "fp32"):
        pointers = {"grad_ptr": grad, "weight_ptr": "bf16", "master_ptr": "fp32"}
        found[f"adamw-fp32-{grad}_grad"] = ("adamw", "_adamw_kernel", {"DECOUPLED": True, "MASTER": 1}, pointers, (86,))
    pointers = {"grad_ptr": "bf16", "weight_ptr": "bf16", "master_ptr": "i16", **bf16_moments}
    found["adamw-split16-bf16_moments"] = (
        "adamw", "_adamw_kernel", {"DECOUPLED": True, "MASTER": 2}, pointers, ARCHITECTURES,
    )  # fmt: skip
    found |= _int8_cases()
    for grad in ("bf16", "fp32"):
        found[f"sum_of_squares-{grad}"] = ("grad_norm", "_sum_of_squares_kernel", {}, {"grad_ptr": grad}, ARCHITECTURES)
    found |= _adafactor_cases()
    found["finish"] = ("grad_norm", "_finish_kernel", {"ACCUMULATE": True}, {}, (86,))
    found["prepare"] = ("grad_norm", "_prepare_kernel", {"CLIP": True, "CORRECT": True}, {}, ARCHITECTURES)
    return found


def _int8_cases() -> dict[str, Any]:
    found: dict[str, Any] = {}
    rules = {
        "adamw": (0, ("beta1", "beta2")),
        "lion": (1, ("code2_ptr", "scale2_ptr", "eps", "weight_decay")),
        "sgd": (2, ("code2_ptr", "scale2_ptr", "beta2", "one_minus_beta2", "eps")),
    }
    for rule, (number, without) in rules.items():
        for form, (master, weight, second) in FORMS.items():
            pointers = {"grad_ptr": "bf16", "weight_ptr": weight, "master_ptr": second}
            constants = {"RULE": number, "OPTION": True, "MASTER": master, **dict.fromkeys(without)}
            archs = ARCHITECTURES if (rule, form) == ("adamw", "fp32") else (86,)
            found[f"{rule}_int8-{form}"] = ("int8", "_int8_kernel", constants, pointers, archs)
    return found


def _adafactor_cases() -> dict[str, Any]:
    found: dict[str, Any] = {}
    matrix = {"FACTORED": True, "BATCHED": False, "FOURS": True}
    batched, vector = {**matrix, "BATCHED": True}, {"FACTORED": False, "BATCHED": False, "FOURS": False}
    for form, (master, weight, second) in FORMS.items():
        pointers = {"grad_ptr": "bf16", "weight_ptr": weight, "master_ptr": second}
        kinds = {"": matrix, "-batched": batched, "-1d": vector} if form == "fp32" else {"": matrix}
        for kind, constexprs in kinds.items():
            constants = {**constexprs, "MASTER": master}
            archs = ARCHITECTURES if form + kind in ("fp32", "split16") else (86,)
            found[f"adafactor-{form}{kind}"] = ("adafactor", "_adafactor_kernel", constants, pointers, archs)
        found[f"weight_square-{form}"] = ("adafactor", "_weight_square_kernel", {"MASTER": master}, pointers, (86,))
    squares, bf16 = "adafactor_squares", {"grad_ptr": "bf16"}
    one = dict.fromkeys(("num_batches", "num_rows", "num_columns", "row_blocks", "col_blocks"), 1)
    blocks = {
        "": (32, 1, 8, 256, {"num_batches": 1}), "-batched": (4, 1, 8, 256, {}), "-small": (1, 128, 4, 4, {}),
        "-one": (1, 1, 1, 1, one),
    }  # fmt: skip
    for name, (depth, batches, rows, columns, ones) in blocks.items():
        constants = {"BLOCKS": depth, "BATCHES": batches, "ROWS": rows, "COLUMNS": columns, **ones}
        archs = (86,) if name else ARCHITECTURES
        found[f"squares{name}"] = (squares, "_squares_kernel", constants, bf16, archs)
    for name, constexprs in (("", matrix), ("-batched", batched), ("-1d", vector)):
        archs = (86,) if name else ARCHITECTURES
        found[f"update_square{name}"] = ("adafactor", "_update_square_kernel", constexprs, bf16, archs)
    ones = {**batched, "FOURS": False, "MASTER": 1, "num_rows": 1, "num_columns": 1, "start": 1}
    pointers = {"grad_ptr": "fp32", "weight_ptr": "bf16", "master_ptr": "fp32"}
    found["adafactor-ones"] = ("adafactor", "_adafactor_kernel", ones, pointers, (86,))
    constants = {"CHUNKS": 4, "PARTIALS": 16}
    found["add_partials"] = (squares, "_add_partials_kernel", constants, {"sum_ptr": "fp32"}, (86,))
    found["variance"] = (squares, "_variance_kernel", {}, bf16, (86,))
    return found


def compiled(module_name: str, kernel_name: str, constexprs: dict, pointers: dict, arch: int, aligned: bool) -> Any:
    """The kernel for one architecture, specialised as the JIT would: aligned pointers, lengths that 16 divides."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = importlib.import_module(f"hift_kernels.{module_name}")
    rounding = importlib.import_module("hift_kernels.rounding")
    kernel = getattr(module, kernel_name)
    warps, own = LAUNCHES.get(kernel_name, (rounding.NUM_WARPS, {}))
    defaults = {"INTERPRETED": False, "ROWS": 2, "GROUP": 256, "TILES": 128, "TILE": rounding.TILE, **own}
    known = {**POINTERS, **pointers}
    signature, values, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name.isupper():
            signature[name], values[name] = "constexpr", {**defaults, **constexprs}[name]
        elif name in constexprs:  # an integer that is 1, or None: the JIT makes it a constant
            signature[name], values[name] = "constexpr", constexprs[name]
        elif name.endswith("_ptr"):
            signature[name] = "*" + known[name]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name in INTEGERS:
            signature[name] = "i32"
            if name in ALIGNED and aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def facts(kernel: Any, machine_code: bool) -> dict[str, Any]:
    """Registers and memory of a compiled kernel, and the accesses to global memory by their width in bits."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        command = [tool, "-res-usage", *(["-sass"] if machine_code else []), cubin]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        told = done.stdout + done.stderr
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", told).groups()
    ptx = kernel.asm["ptx"]
    return {
        **dict(zip(("registers", "stack", "shared", "local"), map(int, numbers), strict=True)),
        "shared": kernel.metadata.shared,
        **(_of_machine_code(told) if machine_code else _of_ptx(ptx)),
        "fused_multiply_add": bool(re.search(r"\bfma\.rn\.f32", ptx)),
        "exact_division": bool(re.search(r"\bdiv\.rn\.(ftz\.)?f32", ptx)),
        "exact_root": bool(re.search(r"\bsqrt\.rn\.(ftz\.)?f32", ptx)),
        "flushes_subnormals": ".ftz." in ptx,
    }


def _of_machine_code(sass: str) -> dict[str, Any]:
    names = re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", sass, re.M)

    def wide(instruction: str) -> dict[int, int]:
        chosen = [name for name in names if name.startswith(instruction)]
        return {width: sum(f".{width}" in name for name in chosen) for width in WIDTHS}

    return {
        "spills": sum(name.startswith(("LDL", "STL")) for name in names),
        "barriers": sum(name.startswith("BAR") for name in names),
        "loads": wide("LDG"),
        "stores": wide("STG"),
    }


def _of_ptx(ptx: str) -> dict[str, Any]:
    """What the assembler spills is not in it, but in the bytes of stack and local memory."""

    def wide(instruction: str) -> dict[int, int]:
        found = re.findall(rf"\b{instruction}\.global\S*?(?:\.v(\d))?\.b(\d+)\s", ptx)
        bits = [int(number or 1) * int(width) for number, width in found]
        return {width: bits.count(width) for width in WIDTHS}

    barriers = len(re.findall(r"\bbar(?:rier)?\.", ptx))
    return {"spills": 0, "barriers": barriers, "loads": wide("ld"), "stores": wide("st")}


def main(everything: bool) -> None:
    result, seen = {}, set()
    for name, (module, kernel, constexprs, pointers, archs) in cases().items():
        form = kernel, constexprs.get("RULE"), constexprs.get("MASTER")
        if everything or form not in seen:
            for arch in archs if everything else (86,):
                built = compiled(module, kernel, constexprs, pointers, arch, True)
                result[f"{name}@{arch}"] = facts(built, everything)
        seen.add(form)
    module, kernel, constexprs, pointers, _ = cases()["adamw-fp32"]
    built = compiled(module, kernel, constexprs, pointers, 86, False)
    result["adamw-fp32-odd_length@86"] = facts(built, everything)
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:] == ["all"])
