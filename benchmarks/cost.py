"""The FLOPs and bytes of a forward pass of published transformers, and upper bounds for saving tokens or weights.

    python -m benchmarks.cost

The costs are counted on the real classes with their published configurations (the config.json of the named Hub
repositories) without allocating their weights; no device is timed. Writes benchmarks/results/cost.json and prints the
tables of docs/cost.md.

The counts are compared to a formula for Wan's block (arXiv:2503.20314) with N video tokens, width d, feed-forward
width f and 512 text tokens. Its FLOPs are: self-attention 4 N N d, its projections 8 N d d, cross-attention
4 * 512 N d, its query and output projections 4 N d d, its key and value projections 4 * 512 d d, feed-forward 4 N d f.
"""

from __future__ import annotations

from typing import Any

from benchmarks.gates import gate, write_result
from benchmarks.resident import peak_resident_mib
from postgen.families.cost import Cost, forward_cost

Size = tuple[int, int, int]

WAN: dict[str, dict[str, Any]] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
}
WAN_SIZES: dict[str, Size] = {"480p": (81, 480, 832), "720p": (81, 720, 1280)}
TEXT = 512

MODELS: dict[str, tuple[dict[str, Any], Size]] = {
    "THUDM/CogVideoX-2b": ({"_class_name": "CogVideoXTransformer3DModel"}, (49, 480, 720)),
    "THUDM/CogVideoX-5b": (
        {
            "_class_name": "CogVideoXTransformer3DModel", "num_attention_heads": 48, "num_layers": 42,
            "use_rotary_positional_embeddings": True,
        },
        (49, 480, 720),
    ),
    "THUDM/CogVideoX1.5-5B": (
        {
            "_class_name": "CogVideoXTransformer3DModel", "num_attention_heads": 48, "num_layers": 42,
            "use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False, "sample_frames": 81,
            "sample_height": 300, "sample_width": 300,
        },
        (81, 768, 1360),
    ),
    "hunyuanvideo-community/HunyuanVideo": ({"_class_name": "HunyuanVideoTransformer3DModel"}, (129, 720, 1280)),
    "Lightricks/LTX-Video": ({"_class_name": "LTXVideoTransformer3DModel"}, (161, 512, 704)),
    "genmo/mochi-1-preview": ({"_class_name": "MochiTransformer3DModel"}, (163, 480, 848)),
    "facebook/DiT-XL-2-256": ({"_class_name": "DiTTransformer2DModel", "out_channels": 8}, (1, 256, 256)),
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": (
        {"_class_name": "PixArtTransformer2DModel", "caption_channels": 4096, "use_additional_conditions": False},
        (1, 1024, 1024),
    ),
    "black-forest-labs/FLUX.1-dev": (
        {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True},
        (1, 1024, 1024),
    ),
    "stabilityai/stable-diffusion-3.5-medium": (
        {
            "_class_name": "SD3Transformer2DModel", "num_layers": 24, "num_attention_heads": 24, "qk_norm": "rms_norm",
            "caption_projection_dim": 1536, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)),
        },
        (1, 1024, 1024),
    ),
}  # fmt: skip

ROUNDED: dict[tuple[str, str], dict[str, float]] = {
    ("1.3B", "480p"): {
        "TFLOP": 283, "attention %": 70, "other products %": 29, "2:4 at 1.3": 1.07, "2:4 at 1.6": 1.12,
        "merge attention .7": 1.60, "merge attention .5": 2.26, "merge block .7": 1.81, "merge block .5": 3.08,
        "half the keys": 1.54, "half the steps at N/4": 1.79,
    },
    ("1.3B", "720p"): {
        "TFLOP": 1250, "attention %": 84, "other products %": 15, "2:4 at 1.3": 1.04, "2:4 at 1.6": 1.06,
        "merge attention .7": 1.79, "merge attention .5": 2.85, "merge block .7": 1.91, "merge block .5": 3.46,
        "half the keys": 1.73,
    },
    ("14B", "480p"): {
        "TFLOP": 1676, "attention %": 52, "other products %": 47, "2:4 at 1.3": 1.12, "2:4 at 1.6": 1.21,
        "merge attention .7": 1.46, "merge attention .5": 1.91, "merge block .7": 1.70, "merge block .5": 2.71,
        "half the keys": 1.36, "half the steps at N/4": 1.74,
    },
    ("14B", "720p"): {
        "TFLOP": 6521, "attention %": 72, "other products %": 28, "2:4 at 1.3": 1.07, "2:4 at 1.6": 1.12,
        "merge attention .7": 1.65, "merge attention .5": 2.42, "merge block .7": 1.82, "merge block .5": 3.12,
        "half the keys": 1.56, "half the steps at N/4": 1.79,
    },
}  # fmt: skip
"""The expected values of every row: TFLOP and per cent rounded to whole numbers, ratios to two decimal places."""


def formula(config: dict[str, Any], tokens: int) -> dict[str, int]:
    """Return the FLOPs of Wan's blocks by the formula, without the key and value projections of the text."""
    width, layers, ffn = config["num_attention_heads"] * 128, config["num_layers"], config["ffn_dim"]
    return {
        "attention": layers * 4 * tokens * tokens * width,
        "projections": layers * 8 * tokens * width * width,
        "cross attention": layers * 4 * TEXT * tokens * width,
        "cross projections": layers * 4 * tokens * width * width,
        "feed-forward": layers * 4 * tokens * width * ffn,
    }


def ceilings(work: dict[str, int]) -> dict[str, float]:
    """Return the largest possible speed-up of a forward pass for each method if only FLOPs took time."""
    total, attention = sum(work.values()), work["attention"]
    products = total - attention - work["cross attention"]
    rest, projections = total - attention, work["projections"]
    row = {
        "TFLOP": total / 1e12,
        "attention %": 100 * attention / total,
        "other products %": 100 * products / total,
        **{f"2:4 at {speed}": total / (total - products * (1 - 1 / speed)) for speed in (1.3, 1.6)},
    }
    for name, keep in ((".7", 0.7), (".5", 0.5)):
        merged = attention * keep**2 + projections * keep + rest - projections
        row[f"merge attention {name}"] = total / merged
        row[f"merge block {name}"] = total / (attention * keep**2 + rest * keep)
    row["half the keys"] = total / (attention / 2 + rest)
    row["half the steps at N/4"] = 2 * total / (total + attention / 16 + rest / 4)
    return row


def numbers(name: str, size: Size, cost: Cost) -> dict[str, Any]:
    """Return the row of one model for the result file."""
    assert cost.grid is not None
    return {
        "model": name,
        "transformer": cost.transformer,
        "size": size,
        "tokens": cost.grid.tokens,
        "tflop": cost.flops / 1e12,
        "parts": {part: work.flops / 1e12 for part, work in cost.parts.items()},
        "weight_gb": cost.total.weight_bytes / 1e9,
        "activation_gb": cost.total.activation_bytes / 1e9,
    }


def wan() -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the costs, the largest speed-ups and the gates of the four Wan rows."""
    rows, limits, gates = [], [], []
    for name, config in WAN.items():
        model = name.split("-")[3]
        for label, (frames, height, width) in WAN_SIZES.items():
            config = {"_class_name": "WanTransformer3DModel", **config}
            cost = forward_cost(config, num_frames=frames, height=height, width=width, text_tokens=TEXT)
            rows.append(numbers(name, (frames, height, width), cost))
            work = formula(config, rows[-1]["tokens"])
            row = ceilings(work)
            limits.append({"model": model, "size": label, "tokens": rows[-1]["tokens"], **row})
            text = config["num_layers"] * 4 * TEXT * (config["num_attention_heads"] * 128) ** 2
            beyond = cost.flops - sum(work.values()) - text - cost.parts["other"].flops
            gates.append(gate(f"{model} {label}: FLOPs counted beyond the formula", beyond, "==", 0))
            for key, target in ROUNDED[model, label].items():
                places = 0 if key == "TFLOP" or key.endswith("%") else 2
                gates.append(gate(f"{model} {label}: {key}", round(row[key], places), "==", target))
    return rows, limits, gates


def main() -> None:
    """Count all costs, write the result and print the tables."""
    before = peak_resident_mib()
    rows, limits, gates = wan()
    for name, (config, size) in MODELS.items():
        frames, height, width = size
        rows.append(numbers(name, size, forward_cost(config, num_frames=frames, height=height, width=width)))
    grown = (peak_resident_mib() - before) / 1024
    gates.append(gate("memory that counting takes, GiB", grown, "<=", 1.0))
    write_result("cost", {"models": rows, "ceilings": limits, "gates": gates})
    print_tables(rows, limits)
    print(f"{sum(row['ok'] for row in gates)} of {len(gates)} gates are met")


def short(number: float) -> str:
    """Format a number with at least two digits."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}" if number >= 1 else f"{number:.2f}"


def print_tables(rows: list[dict[str, Any]], limits: list[dict[str, Any]]) -> None:
    """Print the tables of docs/cost.md."""
    parts = list(rows[0]["parts"])
    print(f"| Model | Frames, size | Tokens | TFLOP | {' | '.join(parts)} | Weights GB | Activations GB |")
    print("|" + "---|" * (len(parts) + 6))
    for row in rows:
        frames, height, width = row["size"]
        shares = " | ".join(f"{100 * row['parts'][part] / row['tflop']:.1f} %" for part in parts)
        sizes = f"{row['model'].split('/')[1]} | {frames}, {width} x {height} | {row['tokens']:,}"
        tflop, moved = short(row["tflop"]), short(row["activation_gb"])
        print(f"| {sizes} | {tflop} | {shares} | {row['weight_gb']:.1f} | {moved} |")
    keys = [key for key in limits[0] if key not in ("model", "size", "tokens")]
    print(f"\n| Wan 2.1 | Tokens | {' | '.join(keys)} |\n|" + "---|" * (len(keys) + 2))
    for row in limits:
        values = [f"{row[key]:,.0f}" if key == "TFLOP" or key.endswith("%") else f"{row[key]:.2f}" for key in keys]
        print(f"| {row['model']} {row['size']} | {row['tokens']:,} | {' | '.join(values)} |")


if __name__ == "__main__":
    main()
