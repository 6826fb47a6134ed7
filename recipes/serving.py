"""Serve conversations in one batch over a shared prefix, streaming: ``python recipes/serving.py --help``."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from headq_ao import HeadQCache, estimate_memory, headq_config, quantize_
from headq_ao.evals.harness.inputs import DTYPES, SMOLLM2, load
from headq_ao.integrations.transformers.models import with_cache

EPILOG = """\
examples:
  python recipes/serving.py                                 8 conversations of 2 turns, all at once
  python recipes/serving.py --batch-size 4 --prefix-cache prefix.safetensors
  python recipes/serving.py --conversations mine.txt        one conversation a line, its turns separated by |

The system prompt is computed once (and with --prefix-cache once for all runs) and repeated for each conversation. Every
row then takes one token a step: of its prompt while there is some left, else the one it has just made. Unequal prompts
so need no padding, and a row that has ended leaves the batch. The next batch starts from the last row of this one,
cropped back to the prefix.
"""
SYSTEM = "You are a helpful assistant. Answer in one short sentence."
TOPICS = ("the sky", "bread", "a violin", "the moon", "rivers", "chess", "glass", "bees")
DEMO = [[f"Tell me one fact about {topic}.", "Why is that so?"] for topic in TOPICS]


@dataclass
class Conversation:
    """One row: tokens that wait to be fed (user turns), and what it has answered."""

    number: int
    turns: list[list[int]]
    pending: list[int] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)

    def next_turn(self) -> bool:
        """Queue the next user turn; False at the end."""
        if not self.turns:
            return False
        self.pending += self.turns.pop(0)
        self.answers.append([])
        return True


@dataclass(frozen=True)
class Event:
    """A piece of an answer; ``last`` where it ends."""

    conversation: int
    turn: int
    token: int
    last: bool


class Server:
    """Runs conversations in batches on one packed cache.

    Args:
        model: with HeadQ.
        prefix: token ids that all conversations share, at least one.
        stop: token ids that end an answer.
        answer_length: most tokens of an answer.
        cache: that holds the prefix already, or None.

    Raises:
        ValueError: on an empty prefix, or a cache of another length.
    """

    def __init__(
        self, model: Any, prefix: list[int], stop: Sequence[int], answer_length: int, cache: HeadQCache | None = None
    ) -> None:
        if not prefix or answer_length < 1:
            raise ValueError("a server needs at least one token of prefix and of answers")
        self.model, self.prefix, self.stop, self.answer_length = model, prefix, set(stop), answer_length
        self.cache = cache if cache is not None else HeadQCache(model)
        if cache is None:
            self.forward([prefix])
        elif cache.get_seq_length() != len(prefix):
            raise ValueError(f"the cache holds {cache.get_seq_length()} tokens, the prefix has {len(prefix)}")
        self.peak_bytes = self.cache.get_memory_footprint()
        self.steps = self.most_tokens = 0

    @torch.no_grad()
    def forward(self, rows: list[list[int]]) -> list[int]:
        """Feed the same number of tokens to each row; the likeliest next token of each."""
        ids = torch.tensor(rows, device=self.model.device)
        return self.model(ids, **with_cache(self.cache), logits_to_keep=1).logits[:, -1].argmax(-1).tolist()

    def serve(self, conversations: list[Conversation], batch_size: int) -> Iterator[Event]:
        """Run all conversations, ``batch_size`` at a time, and yield tokens as they come."""
        for at in range(0, len(conversations), batch_size):
            rows = [c for c in conversations[at : at + batch_size] if c.next_turn()]
            if rows:
                self.start(len(rows))
                yield from self.run(rows)

    def start(self, rows: int) -> None:
        """Go back to the prefix, repeated ``rows`` times."""
        surplus = self.cache.get_seq_length() - len(self.prefix)
        if surplus:
            self.cache.crop(-surplus)
        self.cache.batch_select_indices(torch.tensor([0]))
        self.cache.batch_repeat_interleave(rows)

    def run(self, rows: list[Conversation]) -> Iterator[Event]:
        """One batch until every conversation has ended."""
        while rows:
            n = min(len(row.pending) for row in rows)
            fed, kept = [row.pending[:n] for row in rows], []
            chosen = self.forward(fed)
            for i, (row, token) in enumerate(zip(rows, chosen, strict=True)):
                row.pending = row.pending[n:]
                if row.pending or (yield from self.take(row, token)):
                    kept.append(i)
            self.steps += 1
            self.peak_bytes = max(self.peak_bytes, self.cache.get_memory_footprint())
            self.most_tokens = max(self.most_tokens, self.cache.get_seq_length())
            if kept and len(kept) < len(rows):
                self.cache.batch_select_indices(torch.tensor(kept))
            rows = [rows[i] for i in kept]

    def take(self, row: Conversation, token: int) -> Iterator[Event]:  # its return value: whether the row goes on
        """Add a token to a row's answer, and queue it or what follows the answer."""
        answer = row.answers[-1]
        answer.append(token)
        row.pending.append(token)
        ended = token in self.stop or len(answer) == self.answer_length
        yield Event(row.number, len(row.answers), token, ended)
        return not ended or row.next_turn()  # type: ignore[return-value]


def chat_tokens(tokenizer: Any, system: str, turns: list[list[str]]) -> tuple[list[int], list[list[list[int]]]]:
    """Tokens of the shared prefix and of each user turn, by the chat template or, without one, as plain lines."""
    if tokenizer.chat_template is None:
        encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        return encode(system), [[encode(text) for text in conversation] for conversation in turns]

    def template(*messages: tuple[str, str], reply: bool) -> list[int]:
        chat = [{"role": role, "content": text} for role, text in messages]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=reply, return_dict=False)

    prefix = template(("system", system), reply=False)
    after = tokenizer("\n", add_special_tokens=False)["input_ids"]
    users = [
        [template(("system", system), ("user", t), reply=True)[len(prefix) :] for t in conversation]
        for conversation in turns
    ]
    return prefix, [[c[0], *(after + u for u in c[1:])] for c in users]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description="Serve a batch of conversations with unequal prompts over a shared prefix, streaming the answers.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--model", default=SMOLLM2, help="'smollm2' or what transformers loads (default: %(default)s)")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model (default: %(default)s)")
    p.add_argument("--conversations", type=Path, help="a file, one a line, turns separated by |; default: a demo")
    p.add_argument("--system", default=SYSTEM, help="the shared prefix (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=8, help="conversations at a time (default: %(default)s)")
    p.add_argument("--answer-length", type=int, default=24, help="most tokens of an answer (default: %(default)s)")
    p.add_argument("--prefix-cache", type=Path, help="prompt-cache file of the prefix: read, or written if not there")
    p.add_argument("--calibration", help="a file of calibrate(...).save")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    args = parser().parse_args(argv)
    try:
        if args.batch_size < 1 or args.answer_length < 1:
            raise ValueError("batch-size and answer-length must be at least 1")
        texts = DEMO
        if args.conversations is not None:
            lines = args.conversations.read_text(encoding="utf-8").splitlines()
            texts = [[turn.strip() for turn in line.split("|")] for line in lines if line.strip()]
        model, tokenizer = load(args.model, None, DTYPES[args.dtype])
        config = headq_config(calibration=args.calibration)
        quantize_(model, config)
        prefix, turns = chat_tokens(tokenizer, args.system, texts)
        stored = args.prefix_cache is not None and args.prefix_cache.exists()
        cache = HeadQCache.load(args.prefix_cache, model) if stored else None
        server = Server(model, prefix, [tokenizer.eos_token_id], args.answer_length, cache)
        if args.prefix_cache is not None and not stored:
            server.cache.save(args.prefix_cache)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    conversations = [Conversation(i, list(user)) for i, user in enumerate(turns)]
    shown: dict[int, str] = {}
    for event in server.serve(conversations, args.batch_size):
        text = tokenizer.decode(conversations[event.conversation].answers[-1], skip_special_tokens=True)
        new = text[len(shown.get(event.conversation, "")) :]
        if event.last or new.endswith((".", ",", "\n")):  # a stream in pieces that can be read
            print(f"[{event.conversation}.{event.turn}] {new.strip()}", flush=True)
            shown[event.conversation] = "" if event.last else text
    report = estimate_memory(model, config, max(server.most_tokens, 1), min(args.batch_size, len(conversations)))
    dense = sum(2 * s.n_kv_heads * s.head_dim for s in model._headq.shapes) * model.dtype.itemsize
    estimate, dense = sum(report.bytes.values()), dense * server.most_tokens * args.batch_size
    print(f"{len(conversations)} conversations, {server.steps} steps, cache at most {server.peak_bytes:,} bytes")
    print(f"(estimated {estimate:,}; a dense cache would hold {dense:,})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
