"""Texts → sentence embeddings by a local sentence-transformers model, whose dot products are cosine similarities."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from toolchain.errors import HostError, ModelError
from toolchain.reporter import Reporter, bar
from toolchain.student import precision

_BATCH = 64


def embed(model: Path, texts: Sequence[str], *, report: Reporter) -> npt.NDArray[np.float32]:
    """float32 [texts, width], of length 1. A text beyond the model's limit counts up to there. Raises ModelError."""
    if not (model / "modules.json").is_file():
        raise ModelError(
            f"{model}: not a sentence-transformers model: no modules.json", hint="such as all-MiniLM-L6-v2"
        )
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError as error:
        hint = "pip install -c constraints.txt -e '.[train,embed]'"
        raise HostError(f"embeddings need the package '{error.name}'", hint=hint) from None
    try:
        encoder = SentenceTransformer(
            str(model),
            device=str(precision.pick_device()),
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        raise ModelError(f"{model}: cannot be loaded: {error}") from error
    found = []
    with bar(report, "sentence embeddings", total=len(texts), unit="text") as task:
        for start in range(0, len(texts), _BATCH):
            part = list(texts[start : start + _BATCH])
            found.append(encoder.encode(part, normalize_embeddings=True, show_progress_bar=False))
            task.advance(len(part))
    vectors = np.concatenate(found).astype(np.float32)
    if not np.isfinite(vectors).all():
        raise ModelError(f"{model}: embeddings are not finite", hint="its weights are damaged")
    return vectors
