"""Command line: ``python -m headq_ao.evals.lm_eval``, installed as ``headq-lm-eval``."""

import sys

from lm_eval.__main__ import cli_evaluate

from headq_ao.evals.lm_eval import ModelArgumentError, NothingPackedError
from headq_ao.evals.lm_eval.processes import launched, leave_processes

PROG = "headq-lm-eval"

HELP = """\
headq-lm-eval is lm-eval with one more model, "headq": a Hugging Face causal LM that reads its history from a packed
HeadQ cache while it is scored. Everything else is lm-eval's own.

examples:
  SmolLM2 with the default cache on two local tasks, two requests at a time:
    headq-lm-eval run --model headq --model_args pretrained=smollm2,dtype=float32 \\
        --tasks headq_choice,headq_recall_1024 --include_path evals/tasks --batch_size 8 --limit 20
  the same scored with an exact cache, for comparison:
    headq-lm-eval run --model headq --model_args pretrained=smollm2,dtype=float32,quantized=false ...
  3-bit keys, exact values, calibrated, results kept:
    headq-lm-eval run --model headq \\
        --model_args pretrained=PATH,k_bits=3,v_bits=none,calibration=my.safetensors --output_path out --tasks ...
  short items: neutral text before each prompt, so that there is something to read from the packed cache:
    ... --model_args pretrained=smollm2,min_context=512 --tasks headq_choice ...
  or a smaller exact window:
    ... --model_args pretrained=smollm2,residual_length=16,block_size=16,warmup_tokens=64 ...
  several processes on one machine, which split the documents; the results are those of one:
    torchrun --nproc_per_node 2 -m headq_ao.evals.lm_eval run --model headq ...             on CPUs
    accelerate launch --num_processes 4 -m headq_ao.evals.lm_eval run --model headq ...     a GPU each

--model_args of "headq":
  every argument of lm-eval's "hf" model: pretrained (also "smollm2" or a .gguf file), gguf_file, dtype, max_length ...
  every option of headq_config: preset, k_bits, v_bits, rank, residual_length, n_sink, ... ("none" for exact sides)
  calibration         a .safetensors that Calibration.save wrote, or a text file to calibrate on
  calibration_tokens  of such a text (4096)
  chunk_size          tokens that go through the cache per call once the prompt is in (64; 1 is token by token)
  prefill             tokens of a prompt that go in at once, the rest in chunks (the whole prompt, as generate does)
  min_context         tokens that each prompt is filled up to with neutral text in front (0)
  quantized           false: the exact cache, fed in the same way (true)

The results say under config.headq which share of the rows that scored queries read was packed, task by task. A run
that read no packed token fails: it would have scored the exact cache.
"""


def main() -> int:
    """Run lm-eval's command line with the model ``"headq"``; returns the exit code."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help") or arguments[1:] in (["-h"], ["--help"]):
        print(HELP)
    rank, size = launched()
    try:
        cli_evaluate()
    except (ModelArgumentError, NothingPackedError) as error:
        print(f"{PROG}{f', rank {rank}' if size > 1 else ''}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ModelArgumentError) else 1
    except Exception as error:
        if size > 1:
            error.add_note(f"{PROG}: this was rank {rank} of {size} processes; when one fails, all end")
        raise
    leave_processes()
    return 0


if __name__ == "__main__":
    sys.exit(main())
