"""Starting several processes, and a saved SmolLM2 that each of them reads in a second."""

import os
import signal
import socket
import subprocess
import sys

import pytest
import tokenizers
import torch
import transformers

from headq_ao.evals.harness import inputs
from tests.conftest import ROOT, build_tiny


def torchrun(processes, *command, timeout=150, **environment):
    """Run a script in some processes that talk over gloo; the result has their output together.

    All end with this call, also those of a run that hangs.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    process = subprocess.Popen(
        [*launcher, "--master_addr", "127.0.0.1", "--master_port", str(port), *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"still running after {timeout} s: {output[-4000:]}")
    return subprocess.CompletedProcess(command, process.returncode, output)


@pytest.fixture(scope="session")
def launch():
    return torchrun


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory):
    """SmolLM2 as transformers saves it, with its tokenizer."""
    folder = tmp_path_factory.mktemp("smollm2")
    model, tokenizer = inputs.load("smollm2", None, torch.float32)
    model.is_quantized, model.hf_quantizer = False, None  # its weights are plain: the GGUF file was unpacked
    vars(model).pop("_weight_conversions", None)
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_folder(tmp_path):
    """A folder that transformers loads as model and tokenizer."""
    folder = tmp_path / "tiny"
    build_tiny().save_pretrained(folder)
    words = {"<unk>": 0, "</s>": 1, "<s>": 2} | {f"w{i}": i + 3 for i in range(125)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return folder
