"""Tables of the GPU results."""

import json
from pathlib import Path
from typing import Any

from headq_ao.evals.harness.table import markdown_table

COUNTED = {"registers": "registers", "shared_bytes": "shared bytes", "occupancy_percent": "occupancy, %"}
BASELINES = {"bf16": "bf16 Triton", "gqa": "SDPA enable_gqa"}


def result_table(folder: Path) -> str:
    """The tables of the stages whose results lie in ``folder``, each with where it was measured."""
    made = {"layers": layers_table, "steps": steps_table, "profile": profile_table}
    parts = []
    for stage, table in made.items():
        path = folder / f"{stage}.json"
        if path.exists():
            result = json.loads(path.read_text(encoding="utf-8"))
            parts += [table(result), measured(result)]
    return "\n\n".join(parts)


def layers_table(result: dict[str, Any]) -> str:
    """Decode attention of one layer, and chunks over packed tokens."""
    head = [
        "heads, bits", "batch × tokens", "packed, µs", *(f"{x}, µs" for x in BASELINES.values()), "times as fast",
        "packed / bf16 GB/s",
    ]  # fmt: skip
    rows = []
    for r in result["rows"]:
        if "batch" not in r or "mix" in r:
            continue
        us = r["microseconds"]
        rows.append([
            f"{r['heads']}/{r['kv_heads']}/{r['head_dim']}, {r['k_bits']}/{r['v_bits']}",
            f"{r['batch']} × {r['slots']:,}", *(f"{us[name]:.1f}" for name in ("attend", *BASELINES)),
            f"{r['times_as_fast']:.2f}", f"{r['packed_gb_per_s']:.0f} / {r['dense_gb_per_s']:.0f}",
        ])  # fmt: skip
    mixes = "".join(
        f"\n\nHeads of {'/'.join(map(str, r['mix']))} bits, {r['batch']} × {r['slots']:,} tokens: "
        f"{r['over_uniform']:.2f} × the time of 2 bits." for r in result["rows"] if "over_uniform" in r
    )  # fmt: skip
    return markdown_table(head, rows) + mixes + chunks_table([r for r in result["rows"] if "over_flash" in r])


def chunks_table(rows: list[dict[str, Any]]) -> str:
    """Chunks of new tokens over packed ones, behind an empty line; nothing where none was timed."""
    if not rows:
        return ""
    head = ["heads, bits", "new over packed", "packed, µs", "mixed bits, µs", "flash attention, µs", "over flash"]
    made = []
    for r in rows:
        us = r["microseconds"]
        made.append([
            f"{r['heads']}/{r['kv_heads']}/{r['head_dim']}, {r['k_bits']}/{r['v_bits']}",
            f"{r['new']:,} over {r['packed']:,}", *(f"{us[name]:.0f}" for name in ("chunk", "mixed", "flash")),
            f"{r['over_flash']:.2f}",
        ])  # fmt: skip
    return "\n\n" + markdown_table(head, made)


def steps_table(result: dict[str, Any]) -> str:
    """Steps of a whole model under CUDA graphs."""
    head = ["model, batch × context", "StaticCache, ms", "HeadQ, ms", "HeadQ over it", "prefill, s", "cache, MB"]
    rows = []
    for r in result["rows"]:
        dense, ours = r["dense"], r["packed"]
        rows.append([
            f"{r['layers']} layers of 32/8/128, {r['batch']} × {r['context']:,}", f"{dense['ms']:.2f}",
            f"{ours['ms']:.2f}", f"{r['over_dense']:.2f}", f"{dense['prefill_s']:.2f} / {ours['prefill_s']:.2f}",
            f"{dense['cache_bytes'] / 1e6:.0f} → {ours['cache_bytes'] / 1e6:.0f}",
        ])  # fmt: skip
    return markdown_table(head, rows)


def profile_table(result: dict[str, Any], most: int = 6) -> str:
    """The kernels of the packed cache that take longest in each phase, beside what all take over the dense one."""
    whole = {(r["cache"], r["phase"]): r["microseconds"] for r in result["rows"]}
    rows = []
    for r in result["rows"]:
        if r["cache"] != "packed":
            continue
        phase, total = r["phase"], r["microseconds"]
        over = f"{phase}, {total / whole['dense', phase]:.2f} × dense"
        for name, of in list(r["kernels"].items())[:most]:
            rows.append([
                over, name[:40].replace("|", " "), f"{of['launches']:.0f}", f"{of['microseconds']:.0f}",
                f"{of['microseconds'] / total:.0%}", *(f"{of[x]:.0f}" if x in of else "" for x in COUNTED),
            ])  # fmt: skip
            over = ""
    return markdown_table(["phase", "kernel", "launches", "µs", "share", *COUNTED.values()], rows)


def measured(result: dict[str, Any]) -> str:
    """Where, with what, and what is to be said besides."""
    env = result["environment"]
    text = f"{env['device']}, torch {env['versions']['torch']}, Triton {env['versions']['triton']}"
    if "copy_gb_per_s" in result:
        text += f"; a copy moves {result['copy_gb_per_s']:.0f} GB/s, read and written"
    if "errors" in result:
        text += f"; relative output error at most {max(result['errors'].values()):.1e}"
    if not result["complete"] or "note" in result:
        text += f". {result.get('note', 'The run was cut.')}"
    return f"{text}."
