"""An OpenAI server on loopback: started, waited for, and told how to ask it."""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from headq_ao.evals.vllm import convert

HOST = "127.0.0.1"
START_UP = 600.0  # seconds
PLAIN = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command ``serve``."""
    add = parser.add_argument
    add("--folder", type=Path, default=Path("build/vllm"), help="of checkpoint and calibration (default: %(default)s)")
    add("--port", type=int, default=8000, help="(default: %(default)s)")
    add("--gib", type=int, default=1, help="of pages (default: %(default)s)")
    add("--max-model-len", type=int, default=8192, help="(default: %(default)s)")
    add("--bf16", action="store_true", help="vLLM's own cache, to compare")
    add("--check", action="store_true", help="ask one question, print the answer, stop")


def run(args: argparse.Namespace) -> int:
    """Convert and calibrate SmolLM2 where that is not done, serve it, print a curl line, wait."""
    model, calibration = smollm2(args.folder)
    options = ["--max-model-len", str(args.max_model_len), "--served-model-name", "smollm2"]
    if not args.bf16:
        options += headq_options(calibration)
    with serving(model, options, args.port, args.gib) as process:
        print(f"\nready; ask it with\n\n  {curl_line(args.port)}\n\nCtrl-C ends it", flush=True)
        if args.check:
            print(ask(args.port, "Why is the sky blue?"))
            return 0
        try:
            return process.wait()
        except KeyboardInterrupt:
            return 0


def smollm2(folder: Path, tokens: int = 4096) -> tuple[Path, Path]:
    """Checkpoint folder and calibration of SmolLM2, made where they are missing."""
    model, calibration = folder / "smollm2", folder / "smollm2.headq.safetensors"
    if not (model / "config.json").is_file() or not calibration.is_file():
        command = [str(model), "--calibration", str(calibration), "--tokens", str(tokens)]
        parser = argparse.ArgumentParser()
        convert.add_arguments(parser)
        convert.run(parser.parse_args(command))
    return model, calibration


def headq_options(calibration: Path) -> list[str]:
    """Arguments of vLLM that turn the packed cache on."""
    config = {"headq": {"calibration": str(calibration.resolve())}}
    return ["--attention-backend", "CUSTOM", "--additional-config", json.dumps(config)]


@contextmanager
def serving(model: Path, options: Sequence[str], port: int, gib: int = 1) -> Iterator["subprocess.Popen[bytes]"]:
    """A server's process while it answers; ended with the block.

    Raises:
        RuntimeError: when it ends before it answers, or does not answer in ten minutes.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", HOST]
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"} | PLAIN
    environment["VLLM_CPU_KVCACHE_SPACE"] = str(gib)
    process = subprocess.Popen([*command, "--port", str(port), *options], env=environment)
    try:
        wait_for(process, port)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(process: "subprocess.Popen[bytes]", port: int) -> None:
    """Return when the server answers."""
    end = time.monotonic() + START_UP
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode} before it answered; its messages are above")
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"the server did not answer within {START_UP:.0f} seconds")


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def request_body(question: str) -> dict[str, object]:
    """Of a chat completion."""
    return {"model": "smollm2", "messages": [{"role": "user", "content": question}], "max_tokens": 64}


def curl_line(port: int) -> str:
    """What a shell sends to ask a question."""
    body = json.dumps(request_body("Why is the sky blue?"))
    return f"curl -s http://{HOST}:{port}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"


def ask(port: int, question: str) -> str:
    """The answer to a question."""
    request = urllib.request.Request(
        f"http://{HOST}:{port}/v1/chat/completions",
        json.dumps(request_body(question) | {"temperature": 0}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        text: str = json.load(answer)["choices"][0]["message"]["content"]
        return text
