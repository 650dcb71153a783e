"""Imported before Hugging Face code: nothing is fetched or reported, and tokenizers start no threads of their own."""

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_VERBOSITY="error",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TQDM_DISABLE="1",
    TRL_EXPERIMENTAL_SILENCE="1",
)
