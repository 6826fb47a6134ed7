"""HeadQ in Hugging Face transformers; the only package that imports it."""

# Before any module of this package: what registers them (headq_ao.registration) runs when this is imported.
import transformers.modeling_utils
