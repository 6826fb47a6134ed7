"""Every warning and error of the library, read from its sources, by topic."""

import ast
from collections.abc import Iterator
from pathlib import Path

# Files below the checkout, and how a topic is called in the marks: <!-- generated: messages TOPIC -->
TOPICS: dict[str, tuple[str, ...]] = {
    "options": ("headq_ao/config.py", "headq_ao/byte_size.py", "headq_ao/quantize.py"),
    "models": (
        "headq_ao/integrations/config_only/shapes.py",
        "headq_ao/integrations/config_only/served.py",
        "headq_ao/integrations/transformers/models.py",
        "headq_ao/integrations/transformers/hybrid.py",
        "headq_ao/integrations/transformers/probe.py",
        "headq_ao/integrations/transformers/fallback.py",
        "headq_ao/integrations/transformers/serving.py",
        "headq_ao/integrations/transformers/hooks.py",
        "headq_ao/cache/dequantized.py",
    ),
    "calibration": (
        "headq_ao/calibration",
        "headq_ao/statistics",
        "headq_ao/codecs/layer_codec.py",
        "headq_ao/integrations/transformers/calibrate.py",
    ),
    "calls": (
        "headq_ao/cache/batch.py",
        "headq_ao/cache/layer.py",
        "headq_ao/cache/lengths.py",
        "headq_ao/cache/tensors.py",
        "headq_ao/cache/writing.py",
        "headq_ao/integrations/transformers/attention.py",
        "headq_ao/integrations/transformers/cache.py",
        "headq_ao/integrations/transformers/cache_layer.py",
        "headq_ao/integrations/transformers/calls.py",
        "headq_ao/integrations/transformers/compiled.py",
        "headq_ao/integrations/transformers/generation.py",
        "headq_ao/integrations/config_only/estimate.py",
    ),
    "masks": ("headq_ao/cache/masks.py", "headq_ao/cache/reading.py"),
    "files": (
        "headq_ao/files.py",
        "headq_ao/compression.py",
        "headq_ao/cache/serialize.py",
        "headq_ao/integrations/transformers/prompt_cache.py",
        "headq_ao/integrations/transformers/identity.py",
        "headq_ao/integrations/transformers/hf_quantizer.py",
    ),
    "codecs": ("headq_ao/codecs/registry.py", "headq_ao/codecs/tokenwise.py", "headq_ao/codecs/protocol.py"),
    "kernels": ("ops/cpu_build.py",),
    "vllm": ("headq_ao/integrations/vllm",),
    "kvpress": ("headq_ao/integrations/kvpress",),
    "operators": ("ops",),
}
NO_MESSAGES = ("lazy.py", "user_warning.py")
WARNERS = ("warn", "_warn", "warn_dense")


def message(node: ast.expr) -> str | None:
    """The text of an argument, what is filled in as ``…``; None where there is no text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp):
        return "".join(message(part) or "…" for part in (node.left, node.right))
    return None


def messages(path: Path) -> Iterator[tuple[str, str]]:
    """``"warning"`` or the error's name, and its text, in the order of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, (ast.Raise, ast.Call))]
    for node in sorted(found, key=lambda node: node.lineno):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call) or not call.args:
            continue
        name = ast.unparse(call.func).rpartition(".")[2]
        if isinstance(node, ast.Raise) or name in WARNERS:
            text = message(call.args[0])
            if text is not None and len(text.replace("…", "").split()) > 2:
                yield "warning" if name in WARNERS else name, " ".join(text.split())


def sources(root: Path, topic: str) -> list[Path]:
    """The files of a topic; a folder stands for those that no other topic names."""
    named = {root / name for names in TOPICS.values() for name in names}
    found = list[Path]()
    for name in TOPICS[topic]:
        path = root / name
        found += [path] if path.is_file() else [p for p in sorted(path.rglob("*.py")) if p not in named]
    return found


def left_out(root: Path) -> list[str]:
    """Files with messages that no topic has."""
    named = {path for topic in TOPICS for path in sources(root, topic)}
    named |= {path for path in root.rglob("*.py") if path.name in NO_MESSAGES}
    paths = [*(root / "headq_ao").rglob("*.py"), *(root / "ops").rglob("*.py")]
    return sorted(p.relative_to(root).as_posix() for p in paths if p not in named and any(messages(p)))


def table(root: Path, topic: str) -> str:
    """A topic's messages, warnings first."""
    found = dict.fromkeys(entry for path in sources(root, topic) if path.is_file() for entry in messages(path))
    rows = sorted(found, key=lambda entry: entry[0] != "warning")
    cells = [(kind, text.replace("|", "\\|").replace("<", "&lt;").replace("`", "'")) for kind, text in rows]
    return "\n".join(["| | message |", "| --- | --- |", *(f"| {kind} | {text} |" for kind, text in cells)])
