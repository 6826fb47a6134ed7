"""Runs of whole requests: many at once, few, and conversations that come back to long prefixes."""

from collections import deque
from typing import Any

from headq_ao.evals.vllm.decode import fixed, prompts
from headq_ao.evals.vllm.engine import Ask, Driver, EngineSpec, pages, start


def requests(spec: EngineSpec, count: int, length: int, tokens: int, progress: Any) -> dict[str, Any]:
    """``count`` requests of ``length`` prompt tokens at once, ``tokens`` each out."""
    llm = start(spec)
    driver = Driver(llm)
    ids = prompts(count + 1, length, driver.engine.model_config.get_vocab_size())
    driver.run([Ask("first", ids.pop(), fixed(4))])
    asks = [Ask(str(i), prompt, fixed(tokens)) for i, prompt in enumerate(ids)]
    run = driver.run(asks, on_step=progress)
    return {"requests": count, "prompt": length, "out": tokens, **pages(llm), **run.summary()}


def conversations(
    spec: EngineSpec, count: int, turns: int, prefix: int, question: int, answer: int, at_once: int, progress: Any
) -> dict[str, Any]:
    """``count`` conversations of ``turns`` turns, in rounds: each comes back when all others have had their turn.

    A turn's prompt is the conversation so far and ``question`` new tokens; ``at_once`` turns are in flight. The first
    round brings the prefixes in, the others return to them.
    """
    llm = start(spec)
    driver = Driver(llm)
    vocabulary = driver.engine.model_config.get_vocab_size()
    history = prompts(count, prefix, vocabulary)
    asked = prompts(count * turns, question, vocabulary, seed=1)
    rounds = []
    for turn in range(turns):
        waiting = deque(range(count))

        def ask(turn: int = turn, waiting: deque[int] = waiting) -> Ask | None:
            if not waiting:
                return None
            i = waiting.popleft()
            history[i] += asked[turn * count + i]
            return Ask(f"{turn}-{i}", list(history[i]), fixed(answer))

        def then(output: Any, ask: Any = ask) -> Ask | None:
            history[int(output.request_id.split("-")[1])] += output.outputs[0].token_ids
            follow: Ask | None = ask()
            return follow

        first = [a for a in (ask() for _ in range(at_once)) if a is not None]
        run = driver.run(first, then, on_step=progress)
        cached = sum(output.num_cached_tokens or 0 for output in run.outputs)
        prompt = sum(len(output.prompt_token_ids) for output in run.outputs)
        rounds.append({"turns": len(run.outputs), "cached_share": cached / prompt, **run.summary()})
    return {
        "conversations": count, "prefix": prefix, "question": question, "answer": answer, "at_once": at_once,
        **pages(llm), "rounds": rounds, **{name: per_second(rounds, name) for name in ("wall", "cpu")},
    }  # fmt: skip


def per_second(rounds: list[dict[str, Any]], clock: str) -> dict[str, float]:
    """Finished turns a second: all, and those of the rounds that return."""
    out = {}
    for name, kept in (("turns_per_second", rounds), ("returning_turns_per_second", rounds[1:])):
        seconds = sum(r[clock]["seconds"] for r in kept)
        out[name] = sum(r["turns"] for r in kept) / seconds if seconds else 0.0
    return out
