"""The OpenAI server in its own processes: streams, requests whose client leaves, metrics."""

import http.client
import json
import time
import urllib.request
from pathlib import Path

import pytest

from headq_ao.evals.vllm import server
from tests.vllm import checkpoints
from tests.vllm.engines import PLAIN

OPTIONS = [
    "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-batched-tokens", "64",
    "--block-size", "128", "--served-model-name", "tiny",
]  # fmt: skip


@pytest.fixture(scope="module")
def port(tiny):
    port = server.free_port()
    options = [*OPTIONS, *([] if PLAIN else server.headq_options(Path(tiny[1])))]
    with server.serving(Path(tiny[0]), options, port):
        yield port


def post(port, **body):
    request = {"model": "tiny", "temperature": 0, "ignore_eos": True} | body
    data = json.dumps(request).encode()
    url = f"http://{server.HOST}:{port}/v1/completions"
    return urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=120)


def metrics(port):
    """Name and labels of each metric, and its value."""
    with urllib.request.urlopen(f"http://{server.HOST}:{port}/metrics", timeout=30) as answer:
        lines = [line for line in answer.read().decode().splitlines() if line and not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def running(port):
    return sum(value for name, value in metrics(port).items() if name.startswith("vllm:num_requests_running"))


def test_a_stream_brings_the_text_of_a_whole_answer(port):
    prompt = "A prompt of letters. " * 12
    with post(port, prompt=prompt, max_tokens=40) as answer:
        whole = json.load(answer)["choices"][0]["text"]
    pieces = []
    with post(port, prompt=prompt, max_tokens=40, stream=True) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                pieces.append(json.loads(line[6:])["choices"][0]["text"])
    assert len(pieces) > 5 and "".join(pieces) == whole


def test_a_client_that_leaves_frees_its_pages(port):
    body = {"model": "tiny", "prompt": "x" * 600, "max_tokens": 1400, "stream": True, "ignore_eos": True}
    connection = http.client.HTTPConnection(server.HOST, port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    connection.getresponse().read(64)
    assert running(port) == 1
    connection.sock.close()
    connection.close()
    end = time.monotonic() + 20
    while running(port) and time.monotonic() < end:
        time.sleep(0.2)
    assert running(port) == 0


def test_a_prefix_of_another_client_is_found(port):
    name = next(n for n in metrics(port) if n.startswith("vllm:prefix_cache_hits_total"))
    before = metrics(port)[name]
    for end in ("one", "two"):
        post(port, prompt="A long beginning that is the same. " * 10 + end, max_tokens=2).read()
    assert metrics(port)[name] - before >= 256


@pytest.mark.skipif(PLAIN, reason="of the plug-in")
def test_metrics_count_what_is_packed(port, tiny):
    """Tokens of a prompt and of its answer, none of a prefix that was found; the bytes are those of the pages."""

    def found():
        return {name.partition("{")[0]: value for name, value in metrics(port).items() if name.startswith("headq:")}

    prompt = "Counted, byte by byte. " * 20
    steps = []
    for _ in range(2):
        before = found()
        with post(port, prompt=prompt, max_tokens=9) as answer:
            usage = json.load(answer)["usage"]
        steps.append((found()["headq:packed_tokens_total"] - before["headq:packed_tokens_total"], usage))
    (first, usage), (again, _) = steps
    assert first == usage["prompt_tokens"] + 9
    assert again == first - len(prompt) // 128 * 128
    bits = 2.5 * 2 * checkpoints.LAYERS * checkpoints.KV_HEADS * checkpoints.HEAD_DIM
    after = found()
    assert after["headq:packed_bytes_total"] / after["headq:packed_tokens_total"] == pytest.approx(bits / 8, rel=0.1)
