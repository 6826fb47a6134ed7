"""Serving with vLLM measured: ``python -m headq_ao.evals.vllm --help``."""
