"""``HeadQLM``: lm-eval's Hugging Face model, scored through the packed cache."""

import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm.auto import tqdm

from headq_ao.evals.lm_eval.arguments import ModelArgumentError, split_arguments
from headq_ao.evals.lm_eval.feeding import Request, Stream, chunked_context, score
from headq_ao.evals.lm_eval.filling import NEUTRAL, fill_front
from headq_ao.evals.lm_eval.processes import join_processes
from headq_ao.evals.lm_eval.reads import TaskReads, check_packed, reads_table, rows_read
from headq_ao.integrations.config_only.estimate import estimate_memory
from headq_ao.integrations.transformers.calibrate import calibrate
from headq_ao.integrations.transformers.models import with_cache
from headq_ao.quantize import quantize_

logger = logging.getLogger("lm_eval.headq")  # below lm-eval's own, so that its handler and level apply
CALIBRATION_ROW = 1024
REPORT_TOKENS = 4096
TokenRequest = tuple[Any, list[int], list[int]]  # as HFLM has them: strings or None, context, continuation


@register_model("headq")
class HeadQLM(HFLM):
    """lm-eval's ``"hf"`` model with its keys and values in a packed HeadQ cache, or in an exact one.

    A request's context goes into the cache, then its continuation chunk by chunk, so that each scored token is
    predicted by a query that reads the cache. The counts of what was read stand in the results under
    ``config.headq``.

    Under torchrun or ``accelerate launch`` each process has a model and answers its share of the documents; every
    process gets all answers. To lm-eval it is one process everywhere, of rank 0: were lm-eval to split the documents,
    few-shot examples would be drawn in another order, and a process without a document would fail.

    Args:
        pretrained: what transformers loads, ``"smollm2"``, a ``.gguf`` file, or a loaded causal LM with ``tokenizer``.
        **arguments: those of lm-eval's ``"hf"`` model, the options of :func:`headq_ao.headq_config`, and the fields of
            :class:`headq_ao.evals.lm_eval.arguments.Settings`; ``quantized=False`` for the exact cache.

    Raises:
        ModelArgumentError: on an unknown or unfit argument, before anything is loaded.
        ValueError: when the model or the calibration does not fit.
    """

    def __init__(self, pretrained: Any, **arguments: Any) -> None:
        self.settings, hf = split_arguments({"pretrained": pretrained, **arguments})
        self.processes = join_processes(hf.get("device"))
        self.tasks: dict[str, TaskReads] = {}
        self._reads = TaskReads()
        super().__init__(**hf)
        self._rank, self._world_size = 0, 1  # lm-eval's class counts processes where there are several GPUs
        if self.settings.min_context >= self.max_length:
            raise ModelArgumentError(
                f"min_context must be below max_length {self.max_length}, got {self.settings.min_context}"
            )
        if self.settings.config is not None:
            self._calibrate()
            quantize_(self.model, self.settings.config)

    def _calibrate(self) -> None:
        """Calibrate on the text that the arguments name, if they name one; the first process does it for all."""
        text, tokens = self.settings.calibration_text, self.settings.calibration_tokens
        if text is None:
            return
        ids = self.tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) < tokens:
            raise ModelArgumentError(f"{text.name} has {len(ids)} tokens; say calibration_tokens={len(ids)} or fewer")
        length = min(tokens, CALIBRATION_ROW)
        rows = list(torch.tensor(ids[: tokens // length * length]).view(-1, length))
        assert self.settings.config is not None
        made = [calibrate(self.model, rows, source=text.name) if self.processes.is_main_process else None]
        (calibration,) = broadcast_object_list(made)
        self.settings.config = dataclasses.replace(self.settings.config, calibration=calibration)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Sum of log-probabilities of each continuation, and whether it is the most likely one."""
        return self._by_task(super().loglikelihood, requests, disable_tqdm, fill=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text, in windows of ``max_length`` tokens."""
        return self._by_task(super().loglikelihood_rolling, requests, disable_tqdm, fill=False)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop sequence."""
        return self._by_task(super().generate_until, requests, disable_tqdm, fill=True)

    def _by_task(
        self, answer: Callable[..., list[Any]], requests: list[Instance], disable_tqdm: bool, fill: bool
    ) -> list[Any]:
        """Answer one task after another, so that what is read is counted for its task; answers in the order asked.

        Each process takes every ``num_processes``-th document, with all its requests: they share a context, or are
        samples that must differ.
        """
        state = self.processes
        tasks: dict[str, dict[Any, list[int]]] = {}
        for i, request in enumerate(requests):
            tasks.setdefault(request.task_name or "unnamed", {}).setdefault(request.doc_id, []).append(i)
        mine: list[tuple[int, Any]] = []
        reads = {name: TaskReads() for name in tasks}
        for name, documents in tasks.items():
            share = list(documents.values())[state.process_index :: state.num_processes]
            numbers = [i for document in share for i in document]
            if numbers:
                self._reads = reads[name]
                self._reads.requests += len(numbers)
                asked = [self._filled(requests[i]) if fill else requests[i] for i in numbers]
                given = answer(asked, disable_tqdm=disable_tqdm or not state.is_main_process)
                mine.extend(zip(numbers, given, strict=True))
        answers: list[Any] = [None] * len(requests)
        for theirs, counts in gather_object([(mine, reads)]):
            for i, given in theirs:
                answers[i] = given
            for name, count in counts.items():
                self.tasks.setdefault(name, TaskReads()).merge(count)
        return answers

    def _filled(self, request: Instance) -> Instance:
        """The request with its context filled up to ``min_context`` tokens."""
        if not self.settings.min_context:
            return request
        context, *rest = request.args
        filled = fill_front(context, self.settings.min_context, self.tokenizer, self.tok_encode)
        if filled == context:
            return request
        self._reads.filled += 1
        return dataclasses.replace(request, arguments=(filled, *rest))

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score token requests, longest contexts first; requests that share a context stand beside each other."""
        asked = [self._truncated(request) for request in requests]
        order = sorted(range(len(asked)), key=lambda i: (-len(asked[i].context), asked[i].context, i))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(asked)
        total = sum(len(request.continuation) for request in asked)
        quiet = disable_tqdm or not self.processes.is_main_process
        with tqdm(total=total, desc="Scoring through the cache", unit="tok", disable=quiet) as bar:
            for batch in self._batches(order, asked, requests, override_bs):
                with self._autocast():
                    scored = score(
                        self.model, [asked[i] for i in batch], self.settings, self._reads,
                        dtype=self.softmax_dtype, progress=bar.update,
                    )  # fmt: skip
                for i, answer in zip(batch, scored, strict=True):
                    answers[i] = (answer.logprob, answer.greedy)
                    if requests[i][0] is not None:  # a window of loglikelihood_rolling has no name of its own
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
        return answers

    def _truncated(self, request: TokenRequest) -> Request:
        """A request cut on the left to what the model takes, as lm-eval does."""
        _, context, continuation = request
        if not context or not 0 < len(continuation) <= self.max_length:
            raise ValueError(
                f"a request must have a context and 1 to max_length={self.max_length} continuation tokens, got "
                f"{len(context)} and {len(continuation)}; is a choice empty?"
            )
        tokens = (context + continuation)[-(self.max_length + 1) :]
        if len(tokens) < len(context) + len(continuation):
            logger.warning("cut %d tokens off the left of a prompt", len(context) + len(continuation) - len(tokens))
        return Request(tuple(tokens[: -len(continuation)]), tuple(continuation))

    def _batches(
        self, order: Sequence[int], asked: Sequence[Request], requests: Sequence[TokenRequest], size: int | None
    ) -> Iterator[Sequence[int]]:
        """Batches of request numbers that may go through one cache together."""
        if self.batch_size == "auto" and size is None:
            self.batch_sizes: dict[int, int] = {}
        ordered, done = [requests[i] for i in order], 0
        for _, group in itertools.groupby(order, lambda i: chunked_context(len(asked[i].context), self.settings)):
            rest = list(group)
            while rest:
                n = size or self.batch_size
                if n == "auto":
                    n = self._batch_scheduler(done, ordered)
                yield rest[:n]
                done += len(rest[:n])
                rest = rest[n:]

    def _autocast(self) -> torch.autocast:
        mixed = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=mixed, enabled=mixed is not None)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits ``[B, S, vocab]`` of rows without padding; lm-eval calls it to find a batch size."""
        stream, real = Stream(self.model), torch.ones_like(inps, dtype=torch.bool)
        parts = inps.split(self.settings.chunk_size, 1), real.split(self.settings.chunk_size, 1)
        with torch.no_grad(), self._autocast():
            return torch.cat([stream.feed(*pair) for pair in zip(*parts, strict=True)], 1)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        """``generate`` on left-padded prompts whose cache holds all but their last token.

        So each generated token, the first included, is predicted by a query that reads the cache.
        """
        mask = kwargs.pop("attention_mask").bool()
        groups: dict[int, list[int]] = {}
        for i, length in enumerate(mask.sum(1).tolist()):
            groups.setdefault(chunked_context(length, self.settings), []).append(i)
        new: list[Tensor] = [context[0]] * len(context)
        for rows in groups.values():
            pads = int((~mask[rows]).sum(1).min())
            ids, real = context[rows, pads:], mask[rows, pads:]
            stream = Stream(self.model)
            with torch.no_grad(), self._autocast():
                if ids.shape[1] > 1:
                    stream.feed_context(ids[:, :-1], real[:, :-1], self.settings)
                    stream.expand([i for i in range(len(rows)) for _ in range(kwargs.get("num_beams", 1))])
            before = rows_read(stream.cache)
            out = super()._model_generate(
                ids, max_length - pads, stop, attention_mask=real.long(), **with_cache(stream.cache), **kwargs
            )
            self._reads.add(stream.cache, before)
            for i, row in zip(rows, out, strict=True):
                new[i] = row[ids.shape[1] :]
        pad = self.tokenizer.pad_token_id
        return torch.cat([context, torch.nn.utils.rnn.pad_sequence(new, batch_first=True, padding_value=pad)], 1)

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Take lm-eval's store of answers (``--use_cache``), unless it holds those of other settings.

        lm-eval finds an answer by its request alone, so that a store made with another cache would be read in silence.
        Each process has a store; here each takes what the others hold, so that all ask the model for the same requests.
        """
        super().set_cache_hook(cache_hook)
        store = cache_hook.dbdict
        if store is None:
            return
        model = {"model": str(self.pretrained), "dtype": str(self.model.dtype)}
        mine = json.dumps({**model, **self._settings_dict()}, sort_keys=True, default=str)
        stores = gather_object([dict(store)])
        if any(each and each.get("headq_settings") != mine for each in stores):
            raise ModelArgumentError("--use_cache names a file with answers of another model or cache; take a new one")
        store.update({key: answer for each in stores for key, answer in each.items() if key not in store})
        store["headq_settings"] = mine

    def _settings_dict(self) -> dict[str, Any]:
        filled = NEUTRAL.name if self.settings.min_context else None
        return {**self.settings.to_dict(), "neutral_text": filled, "max_length": self.max_length}

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval puts into ``results["config"]``, ``"headq"`` among it.

        ``lm_eval.simple_evaluate`` and the command line call it when all tasks are done; call it after
        ``lm_eval.evaluate``, which does not.

        Raises:
            NothingPackedError: when a packed cache was asked for and no packed token was read.
        """
        tasks = {name: task.to_dict() for name, task in self.tasks.items()}
        info = {**self._settings_dict(), "processes": self.processes.num_processes, "tasks": tasks}
        config = self.settings.config
        if config is not None:
            info[f"bits_at_{REPORT_TOKENS}"] = estimate_memory(self.model, config, REPORT_TOKENS).bits_at_t
            for warning in check_packed(self.tasks):
                logger.warning(warning)
            if self.tasks and self.processes.is_main_process:
                print(reads_table(self.tasks))
        return {**super().get_model_info(), "headq": info}
