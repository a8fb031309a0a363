"""The report of low precision: gates and tables from the results of the other benchmarks.

`python -m benchmarks.lowp_report` adds the gates of steps, LoRA and the judge to those of attention in
`results/lowp_attention.json`, and writes the tables of `docs/low_precision.md` and `docs/low_precision_linears.md`. It
measures nothing. If a result file is missing, its gate has no value and its table is empty.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import docs_tables
from benchmarks.command import without_options
from benchmarks.gates import RESULTS, Gate, amend_result, gate, read_result
from benchmarks.lit_tables import digits, table

Result = Mapping[str, Any]
NAMES = ("lowp_attention", "lowp_attention_without_fa4", "lowp_linears", "lowp_steps", "lowp_judge")
JOINED = {
    "step_14b_720p_vs_exact": (">=", 1.25),
    "step_14b_480p_vs_stock": (">=", 1.6),
    "judge_drop": ("<=", 0.01),
    "lora_on_fp8": ("==", 1),
}
"""Gates of other result files that are repeated in the file of attention: name -> (comparison, target)."""
KERNELS = {
    "default": "torch's default",
    "cudnn": "cuDNN, bfloat16",
    "fa4": "FlashAttention-4",
    "xformers": "xformers",
    "sageattention": "SageAttention 1",
}
FORMS = {"fp8_linears": "FP8 linear layers", "fp8_attention": "FP8 attention", "fp8_both": "both"}
PAGES = RESULTS.parent.parent / "docs"


def results() -> dict[str, Result]:
    """Return the contents of the existing result files, by name."""
    return {name: read_result(name) for name in NAMES if (RESULTS / f"{name}.json").is_file()}


def joined(found: Mapping[str, Result]) -> list[Gate]:
    """Return the gates of attention and those of `JOINED`; a gate that was not measured has the value None."""
    own = [each for each in found["lowp_attention"]["gates"] if each["name"] not in JOINED]
    files = [result for name, result in found.items() if name != "lowp_attention"]
    others = {each["name"]: each["value"] for result in files for each in result["gates"]}
    return own + [gate(name, others.get(name), op, target) for name, (op, target) in JOINED.items()]


def attention(found: Mapping[str, Result]) -> Iterator[str]:
    """Yield the table of milliseconds of every kernel and of rounding; those of xformers come from a separate run."""
    rows = {row["shape"]: row for row in found.get("lowp_attention", {}).get("rows", ())}
    more = {row["shape"]: row for row in found.get("lowp_attention_without_fa4", {}).get("rows", ())}
    there = [name for name in KERNELS if any(name in row["ms"] for row in (*rows.values(), *more.values()))]
    heads = ["", "FP8", "rounding alone", *(KERNELS[name] for name in there), "TFLOP/s of FP8", "faster than the best"]
    yield from _table(heads, [_attention_row(row, more.get(shape, {}), there) for shape, row in rows.items()])


def _attention_row(row: Result, more: Result, there: Sequence[str]) -> list[str]:
    times = {**more.get("ms", {}), **row["ms"]}
    exact = min(times[name] for name in there if name in times and name != "sageattention")
    cells = [digits(times[name]) if name in times else "" for name in there]
    speed = [digits(row["tflop_per_s"]["cudnn_fp8"]), f"{exact / times['cudnn_fp8']:.2f}"]
    return [row["shape"], digits(times["cudnn_fp8"]), digits(row["rounding_ms"]), *cells, *speed]


def errors(found: Mapping[str, Result]) -> Iterator[str]:
    """Yield the table of errors of FP8 attention by kind of inputs, over all heads and of the worst head."""
    rows = found.get("lowp_attention", {}).get("rows", ())
    kinds = list(rows[0]["errors"]) if rows else []
    others = [name for name in KERNELS if rows and all(name in row["errors"][kind] for row in rows for kind in kinds)]
    heads = ["", *(f"{kind} (worst head)" for kind in kinds), *(f"{KERNELS[name]}, normal" for name in others)]
    yield from _table(heads, [_error_row(row, kinds, others) for row in rows])


def _error_row(row: Result, kinds: Sequence[str], others: Sequence[str]) -> list[str]:
    told = []
    for kind in kinds:
        each = row["errors"][kind]["cudnn_fp8"]
        told.append(f"{each['error']:.3f} ({each['worst_head']:.3f})")
    return [row["shape"], *told, *(f"{row['errors']['normal'][name]['error']:.4f}" for name in others)]


def layers(found: Mapping[str, Result]) -> Iterator[str]:
    """Yield the table of linear layers: times in bfloat16 and FP8, and the error of fast accumulation."""
    heads = [
        "",
        "Layers",
        "bfloat16, ms",
        "FP8",
        "rounding alone",
        "faster",
        "product, fast accumulation",
        "error of the product",
    ]
    rows = [
        [
            *(
                row["model"],
                row["layers"],
                digits(row["bf16_ms"]),
                digits(row["kernel_ms"]),
                digits(row["quantise_ms"]),
            ),
            f"{row['fp8_vs_bf16']:.2f}",
            f"{digits(row['product_ms'])} -> {digits(row['fast_product_ms'])}",
            f"{row['coherent_error']:.3f} -> {row['fast_coherent_error']:.3f}",
        ]
        for row in found.get("lowp_linears", {}).get("layers", ())
    ]
    yield from _table(heads, rows)


def steps(found: Mapping[str, Result]) -> Iterator[str]:
    """Yield the table of whole steps: milliseconds, and the speed relative to the best exact form and to stock."""
    heads = ["", "stock", "compiled", "best exact", *(f"{name} (x best exact, x stock)" for name in FORMS.values())]
    rows = [
        [
            *(row["model"], digits(row["stock_ms"]), digits(row["stock_compiled_ms"]), digits(row["best_exact_ms"])),
            *(
                f"{digits(row['best_exact_ms'] / row[f'{form}_vs_exact'])}"
                f" ({row[f'{form}_vs_exact']:.2f}, {row[f'{form}_vs_stock']:.2f})"
                for form in FORMS
            ),
        ]
        for row in found.get("lowp_steps", {}).get("steps", ())
    ]
    yield from _table(heads, rows)


def judged(found: Mapping[str, Result]) -> Iterator[str]:
    """Yield the table of the judge's scores of clips of the embedded model."""
    heads = ["", "judge", "drop, 95 %", "PSNR to exact, dB", "lowest", "motion ratio"]
    rows = [
        [
            *(row["mode"], f"{row['score']:.4f}"),
            f"{row['drop']['value']:.4f} [{row['drop']['low']:.4f}, {row['drop']['high']:.4f}]",
            *(f"{row['psnr']:.1f}", f"{row['lowest_psnr']:.1f}", f"{row['motion_ratio']:.3f}"),
        ]
        for row in found.get("lowp_judge", {}).get("rows", ())
    ]
    yield from _table(heads, rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield from table(heads, rows) if rows else [docs_tables.NOTHING]


def write_pages(found: Mapping[str, Result], folder: Path = PAGES) -> None:
    """Write the tables of both documentation pages."""
    of_attention = {"fp8_attention": attention(found), "fp8_errors": errors(found), "fp8_steps": steps(found)}
    docs_tables.write(folder / "low_precision.md", of_attention)
    docs_tables.write(folder / "low_precision_linears.md", {"fp8_layers": layers(found), "fp8_judge": judged(found)})


def main(argv: Sequence[str] | None = None) -> int:
    """Join the gates and write the tables of the pages."""
    without_options("benchmarks.lowp_report", __doc__, argv)
    found = results()
    if "lowp_attention" in found:
        amend_result("lowp_attention", {}, {}, joined(found))
    write_pages(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
