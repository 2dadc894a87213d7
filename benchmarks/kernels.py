"""What the Triton kernels compile to, without a GPU: registers, shared memory and spills of each, for sm_80 and sm_90.

    python benchmarks/kernels.py [--json FILE]

Triton compiles to PTX; the ptxas in its wheel reports on that, with the options Triton itself gives it. TRITON_INTERPRET
must not be set. The table in docs/kernels.md is this one, and a test holds it there.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engrid.model.kernels.dequant import BLOCK as PLACES
from engrid.model.kernels.dequant import dequantise_kernel
from engrid.model.kernels.gate import blocks, gated_kernel
from engrid.model.kernels.hash import BLOCK as POSITIONS
from engrid.model.kernels.hash import row_ids_kernel

TARGETS = (80, 90)


@dataclass(frozen=True)
class Case:
    """A kernel as its launcher would have it compiled; pointers are aligned to 16 bytes, as torch's allocations are."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]

    def source(self) -> ASTSource:
        signature = {name: self.types.get(name, "constexpr") for name in self.kernel.arg_names}
        aligned = {
            (at,): [["tt.divisibility", 16]] for at, kind in enumerate(signature.values()) if kind.startswith("*")
        }
        return ASTSource(self.kernel, signature, self.constants, aligned)


def hash_case(name: str, orders: int, heads: int) -> Case:
    pointers = dict.fromkeys(("grams", "multipliers", "primes", "offsets", "out"), "*i64")
    constants = {
        "ORDERS": orders,
        "HEADS": heads,
        "PADDED_HEADS": triton.next_power_of_2(heads),
        "BLOCK": POSITIONS,
    }
    return Case(f"hash, {name}", row_ids_kernel, pointers | {"positions": "i32"}, constants)


def dequant_case(name: str, kind: str) -> Case:
    types = {"raw": "*u8", "inverse": "*i64", "out": f"*{kind}", "places": "i32", "rows": "i32"}
    return Case(f"dequant, {name}", dequantise_kernel, types, {"BFLOAT16": kind == "bf16", "BLOCK": PLACES})


def gate_case(name: str, kind: str, branches: int, width: int) -> Case:
    block_t, block_d = blocks(width)
    pointers = ("h", "keys", "values", "query_weight", "key_weight", "gates", "u")
    types = dict.fromkeys(pointers, f"*{kind}") | {
        "dead": "*u8",
        "tokens": "i32",
        "eps": "fp32",
        "inverse_root": "fp32",
    }
    constants = {"M": branches, "D": width, "HAS_DEAD": True, "BLOCK_T": block_t, "BLOCK_D": block_d}
    return Case(f"gate, {name}", gated_kernel, types, constants)


CASES = (
    hash_case("orders 2-3, 8 heads", 2, 8),
    hash_case("orders 2-4, 8 heads", 3, 8),
    dequant_case("float32", "fp32"),
    dequant_case("bfloat16", "bf16"),
    gate_case("M 1, D 256, float32", "fp32", 1, 256),
    gate_case("M 4, D 2560, bfloat16", "bf16", 4, 2560),
    gate_case("M 4, D 5120, bfloat16", "bf16", 4, 5120),
)


def compiled(case: Case, target: int) -> dict[str, Any]:
    """What the table says of one kernel on one target."""
    result = triton.compile(case.source(), target=GPUTarget("cuda", target, 32))
    report = ptxas(result.asm["ptx"], target)
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.search(r"Used (\d+) registers", report)
    assert spills, report
    assert registers, report
    return {
        "kernel": case.name,
        "target": f"sm_{target}",
        "warps": result.metadata.num_warps,
        "registers": int(registers[1]),
        "shared": result.metadata.shared,
        "stack": int(spills[1]),
        "spills": int(spills[2]) + int(spills[3]),
        "cubin": len(result.asm["cubin"]),
        "flushes": len(re.findall(r"\b(?:mul|add|sub|fma)\S*\.ftz", result.asm["ptx"])),
    }


def ptxas(ptx: str, target: int) -> str:
    """Its report; sm_90a is what Triton asks for on Hopper."""
    architecture = f"sm_{target}a" if target >= 90 else f"sm_{target}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        command = [triton.knobs.nvidia.ptxas.path, "-v", "-lineinfo", "--regAllocOptLevel=2"]
        command += [f"--gpu-name={architecture}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stderr


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| kernel | target | threads | registers per thread | shared memory, bytes | stack, bytes | spills, bytes |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [
            row["kernel"],
            row["target"],
            row["warps"] * 32,
            *(row[key] for key in ("registers", "shared", "stack", "spills")),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all that was measured here")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: unset it to compile")
    rows = [compiled(case, target) for case in CASES for target in TARGETS]
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
