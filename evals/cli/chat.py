"""``headq chat``: talk to a model whose history is in a packed cache, and see what that saves."""

import argparse
import sys
import time
from typing import Any

from headq_ao.byte_size import bytes_text
from headq_ao.evals.cli import loading
from headq_ao.evals.cli.console import UsageError, add_command, at_least, note, say
from headq_ao.evals.cli.estimate import exact_bytes, size

NAME = "chat"
DESCRIPTION = """\
A conversation in the terminal. Answers are printed as they come; after each, one line says how many tokens the cache
holds, how many bytes it takes, and what an exact one would take. Nothing is computed twice: the cache is kept between
turns. Ctrl-C stops an answer; /clear forgets the conversation; /bye or Ctrl-D ends it."""
EXAMPLES = """\
  headq calibrate smollm2 -o smollm2.safetensors && headq chat smollm2 --calibration smollm2.safetensors
  headq chat path/to/model --prompt "Why is the sky blue?"                 one answer, then end
  headq chat smollm2 --exact                                               the same with the exact cache"""


def add(commands: Any) -> None:
    """The parser of ``headq chat``."""
    parser = add_command(commands, NAME, "talk to a model and see what the cache saves", DESCRIPTION, EXAMPLES)
    parser.set_defaults(run=run)
    loading.add_model(parser)
    option = parser.add_argument
    option("--calibration", metavar="FILE", help="of headq calibrate; without one, each conversation's own statistics")
    option("--preset", metavar="NAME", help=loading.PRESET_HELP)
    option("--budget", type=size, metavar="SIZE", help="take the bits that fit --context tokens into it: 100MB, 1GiB")
    option("--context", type=at_least(1), default=4096, metavar="N", help="tokens that --budget is for (4096)")
    option("--exact", action="store_true", help="transformers' own cache, to compare")
    option("--prompt", metavar="TEXT", help="answer this and end")
    option("--system", metavar="TEXT", help="what the model is told first")
    option("--max-new-tokens", type=at_least(1), default=512, metavar="N", help="of an answer (512)")
    option(
        "--sample", action="store_true", help="draw tokens as the model's generation config says, instead of greedily"
    )


class Conversation:
    """Messages, their token ids, and the cache that holds all of them but the last one.

    Args:
        model: quantized with HeadQ, or not.
        tokenizer: its own; without a chat template the text is continued as it is.
        exact: keep transformers' own cache.
    """

    def __init__(self, model: Any, tokenizer: Any, args: argparse.Namespace) -> None:
        from headq_ao import headq_config
        from headq_ao.integrations.config_only.served import served

        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.layers = served(model, headq_config())
        self.forget()

    def forget(self) -> None:
        """Begin again."""
        self.messages = [{"role": "system", "content": self.args.system}] if self.args.system else []
        self.ids: list[int] = []
        self.cache: Any = None

    def take_back(self) -> None:
        """Forget the last message, whose answer was stopped; the next one is computed from the beginning."""
        del self.messages[-1:]
        self.ids, self.cache = [], None

    def new_cache(self) -> Any:
        """An empty one."""
        from transformers import DynamicCache

        from headq_ao import HeadQCache

        return DynamicCache(config=self.model.config) if self.args.exact else HeadQCache(self.model)

    def encode(self, text: str) -> list[int]:
        """The token ids of the conversation with one more message."""
        self.messages.append({"role": "user", "content": text})
        if self.tokenizer.chat_template is None:
            return self.ids + list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        made = self.tokenizer.apply_chat_template(self.messages, add_generation_prompt=True, return_dict=True)
        return list(made["input_ids"])

    def answer(self, text: str) -> str:
        """Print the model's answer as it comes, and return it."""
        import torch
        from transformers import TextStreamer

        from headq_ao.integrations.transformers.models import with_cache

        ids = self.encode(text)
        held = 0 if self.cache is None else self.cache.get_seq_length()
        if self.cache is None or ids[:held] != self.ids[:held]:  # a template may write old answers differently
            self.cache = self.new_cache()
        start, before = time.perf_counter(), len(ids)
        given = torch.tensor([ids], device=self.model.device)
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        out = self.model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=self.args.max_new_tokens,
            do_sample=self.args.sample, streamer=streamer, **with_cache(self.cache),
        )  # fmt: skip
        self.ids = out[0].tolist()
        said: str = self.tokenizer.decode(self.ids[before:], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": said})
        note(self.status(len(self.ids) - before, time.perf_counter() - start))
        return said

    def status(self, new: int, seconds: float) -> str:
        """Tokens in the cache, its bytes, those of an exact one, and the speed."""
        tokens = self.cache.get_seq_length()
        exact = exact_bytes(self.layers, tokens, 1, self.model.dtype.itemsize)
        speed = f"{new / seconds:.1f} tokens/s"
        if self.args.exact:
            return f"[{tokens:,} tokens, cache {bytes_text(exact)}, {speed}]"
        held = self.cache.get_memory_footprint()
        report = self.cache.bits_report()
        spare = report.bytes["unused"]
        room = f" ({bytes_text(spare)} of it for tokens to come)" if spare > exact / 4 else ""
        saved = f"cache {bytes_text(held)}{room}, exact {bytes_text(exact)}"
        return f"[{tokens:,} tokens, {report.packed_rows:,.0f} packed, {saved}, {speed}]"


def run(args: argparse.Namespace) -> int:
    """Talk until the input ends."""
    from headq_ao import headq_config, quantize_

    if args.prompt is not None and not args.prompt.strip():
        raise UsageError("--prompt must have some text; without --prompt a conversation begins")
    if args.exact and (args.calibration or args.preset or args.budget):
        raise UsageError("--exact takes no --calibration, no --preset and no --budget")
    budget = {} if args.budget is None else {"cache_bytes": args.budget, "context_length": args.context}
    try:
        config = None if args.exact else headq_config(preset=args.preset, calibration=args.calibration, **budget)
    except ValueError as error:
        raise UsageError(str(error)) from error
    known = loading.read_calibration(args.calibration)
    loading.check_calibration(known, loading.model_config(args))
    model, tokenizer = loading.load_model(args)
    if config is not None:
        quantize_(model, config)
    if config is not None and args.calibration is None:
        note(
            "without --calibration a conversation's first tokens stay in full precision until they give its statistics"
        )
    conversation = Conversation(model, tokenizer, args)
    if args.prompt is not None:
        conversation.answer(args.prompt)
        return 0
    tty = sys.stdin.isatty()
    while True:
        try:
            text = (input("> ") if tty else input()).strip()
        except EOFError:
            say()
            return 0
        if text == "/bye":
            return 0
        if text == "/clear":
            conversation.forget()
            note("[forgotten]")
        elif text:
            try:
                conversation.answer(text)
            except KeyboardInterrupt:
                conversation.take_back()
                note("[stopped; the message is taken back; /bye or Ctrl-D ends the conversation]")
