"""What an engine is asked for, and what is made of its steps; no engine runs here."""

import argparse
import math
import random
from types import SimpleNamespace

import pytest
import torch

from headq_ao.evals.vllm import decode, measure, quality, recall, soak, soak_command, workloads
from headq_ao.evals.vllm.engine import Ask, Driver, EngineSpec, Run, Step


def test_each_cache_asks_for_its_own():
    assert "kv_cache_dtype" not in EngineSpec("m").arguments()
    assert EngineSpec("m", "fp8").arguments()["kv_cache_dtype"] == "fp8"
    asked = EngineSpec("m", "headq", headq={"calibration": "c"}).arguments()
    assert asked["attention_backend"] == "CUSTOM" and asked["additional_config"] == {"headq": {"calibration": "c"}}
    with pytest.raises(ValueError, match="bf16, fp8, headq"):
        EngineSpec("m", "int4")


def test_a_description_has_no_folder_of_this_machine():
    described = EngineSpec("/a/b/m", "headq", headq={"calibration": "/a/c.safetensors", "window": 64}).describe()
    assert described["model"] == "m" and described["headq"] == {"calibration": "c.safetensors", "window": 64}
    assert "headq" not in EngineSpec("m").describe()


def engine(plan):
    """An engine that schedules ``plan``: of each step, new tokens of each request; all ask for two tokens out."""
    requests = {}

    def schedule():
        scheduled = plan.pop(0)
        for name, n in scheduled.items():
            requests[name].num_computed_tokens += n
        return SimpleNamespace(num_scheduled_tokens=scheduled, preempted_req_ids=None)

    def add_request(name, prompt, sampling, lora_request=None):
        requests[name] = SimpleNamespace(num_computed_tokens=0, num_prompt_tokens=len(prompt["prompt_token_ids"]))

    def step():
        out = made.engine_core.engine_core.scheduler.schedule()
        done = [n for n in out.num_scheduled_tokens if requests[n].num_computed_tokens > requests[n].num_prompt_tokens]
        return [SimpleNamespace(finished=True, request_id=requests.pop(n) and n) for n in done]

    scheduler = SimpleNamespace(schedule=schedule, requests=requests)
    core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler))
    made = SimpleNamespace(
        engine_core=core, add_request=add_request, step=step, has_unfinished_requests=lambda: bool(requests)
    )
    return SimpleNamespace(llm_engine=made)


def test_a_run_tells_prompt_tokens_from_decoded_ones():
    driver = Driver(engine([{"a": 4, "b": 2}, {"a": 1, "b": 3}, {"b": 1}]))
    run = driver.run([Ask("a", [0] * 4, None), Ask("b", [0] * 5, None)])
    assert [(s.prompt_tokens, s.decode_tokens) for s in run.steps] == [(6, 0), (3, 1), (0, 1)]
    assert [o.request_id for o in run.outputs] == ["a", "b"]


def test_an_answer_brings_the_next_request():
    driver = Driver(engine([{"a": 1}, {"a": 1}, {"b": 1}, {"b": 1}]))
    following = [Ask("b", [0], None)]
    run = driver.run([Ask("a", [0], None)], then=lambda output: following.pop() if following else None)
    assert [o.request_id for o in run.outputs] == ["a", "b"]


def test_an_engine_of_other_processes_is_refused():
    with pytest.raises(RuntimeError, match="VLLM_ENABLE_V1_MULTIPROCESSING"):
        Driver(SimpleNamespace(llm_engine=SimpleNamespace(engine_core=object())))


def test_the_decode_phase_is_the_steps_without_a_prompt():
    run = Run([Step(3.0, 2.0, 100, 1), Step(0.5, 0.25, 0, 4), Step(0.5, 0.25, 0, 2)], [])
    told = run.summary()
    assert told["wall"] == {"seconds": 4.0, "prefill_share": 0.75, "decode_tokens_per_second": 6.0}
    assert told["cpu"]["decode_tokens_per_second"] == 12.0 and told["largest_batch"] == 4
    assert told["prompt_tokens"] == 100 and told["decode_tokens"] == 7


def test_step_times_are_those_of_the_whole_batch():
    steps = [Step(9.0, 9.0, 5, 2)] + [Step(0.001 * i, 0.002 * i, 0, 2) for i in range(1, 9)] + [Step(9.0, 9.0, 0, 1)]
    found = decode.step_times(Run(steps, []), 2)
    assert found["steps"] == 5 and found["wall_ms"] == pytest.approx(6.0) and found["cpu_ms"] == pytest.approx(12.0)
    with pytest.raises(RuntimeError, match="does not hold"):
        decode.step_times(Run(steps, []), 3)


def test_divergence_is_the_mean_over_tokens():
    p = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    q = torch.tensor([[0.25, 0.75], [0.25, 0.75]]).log()
    expected = 0.5 * (math.log(2) + math.log(0.5 / 0.75)) / 2
    assert quality.divergence(p, q) == pytest.approx(expected)


def test_returning_turns_leave_the_first_round_out():
    rounds = [{"turns": 4, "wall": {"seconds": 8.0}}, {"turns": 4, "wall": {"seconds": 2.0}}]
    assert workloads.per_second(rounds, "wall") == {"turns_per_second": 0.8, "returning_turns_per_second": 2.0}


def test_lm_eval_reads_in_chunks_and_gets_no_braces():
    spec = EngineSpec("folder", "headq", batched_tokens=64, headq={"calibration": "c"})
    command = recall.lm_eval_command(spec.arguments(), "headq_recall_1024", 5, "out")
    pairs = command[command.index("--model_args") + 1]
    assert (
        "pretrained=folder," in pairs and "max_num_batched_tokens=64" in pairs and "attention_backend=CUSTOM" in pairs
    )
    assert "{" not in pairs


def test_prompts_of_a_soak_share_beginnings():
    made = soak.prompts(200, 100, random.Random(0), 50)
    lengths = {len(p) for p in made}
    assert min(lengths) == 1 and 50 < max(lengths) <= 100
    starts = [tuple(p[:10]) for p in made if len(p) > 20]
    assert len(set(starts)) < len(starts) - 5


def test_the_gap_where_two_outputs_part():
    def output(tokens):
        found = [{0: SimpleNamespace(logprob=-1.0), 1: SimpleNamespace(logprob=-1.5)} for _ in tokens]
        return SimpleNamespace(token_ids=tokens, logprobs=found)

    assert soak.first_gap(output([1, 2]), output([1, 2])) is None
    assert soak.first_gap(output([1, 2]), output([1, 3])) == pytest.approx(0.5)


def test_the_change_of_a_log_probability_until_two_outputs_part():
    def output(tokens, logprobs):
        found = [{t: SimpleNamespace(logprob=x)} for t, x in zip(tokens, logprobs, strict=True)]
        return SimpleNamespace(token_ids=tokens, logprobs=found)

    one, other = output([1, 2, 3], [-1.0, -1.5, -1.0]), output([1, 2, 4], [-1.25, -1.5, -3.0])
    assert soak.largest_change(one, other) == pytest.approx(0.25)


def test_a_soak_fails_on_tokens_or_pages(capsys):
    good = {"largest_gap": 0.1, "page_bytes_differing": 0.0}
    assert soak_command.verdict(good, 0.2) == 0
    assert soak_command.verdict(good, 0.05) == 1 and "gap" in capsys.readouterr().err
    assert soak_command.verdict(good | {"page_bytes_differing": 0.1}, 0.2) == 1 and "bytes" in capsys.readouterr().err


def test_headq_needs_a_calibration(tmp_path):
    parser = argparse.ArgumentParser()
    measure.add_common(parser)
    args = parser.parse_args([str(tmp_path), "--preset", "quality"])
    assert measure.spec_of(args, "bf16").headq == {}
    with pytest.raises(ValueError, match="--calibration"):
        measure.spec_of(args, "headq")
    args.calibration = tmp_path / "c"
    assert measure.spec_of(args, "headq").headq["preset"] == "quality"
