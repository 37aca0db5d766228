"""Descriptions as vectors: each distinct text once, nothing for none, and kept."""

from pathlib import Path

import numpy as np
import pytest

from launch import ur4rec_lists
from launch.ur4rec_lists import kept_vectors, vectors_now


def test_each_distinct_text_is_encoded_once_and_kept(
    backbone_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, texts = str(backbone_root / "stories260k"), ["", "a cat", "two dogs", "a cat"]
    vectors = kept_vectors(texts, encoder, tmp_path)
    assert vectors.dtype == np.float16
    assert np.linalg.norm(vectors.astype(np.float32), axis=1) == pytest.approx([0, 1, 1, 1], abs=1e-2)
    assert np.array_equal(vectors[1], vectors[3])
    assert not np.allclose(vectors[1], vectors[2], atol=0.05)
    asked: list[list[str]] = []
    monkeypatch.setattr(ur4rec_lists, "text_vectors", lambda model, tokenizer, texts: asked.append(texts))
    assert np.array_equal(kept_vectors(texts, encoder, tmp_path), vectors)
    assert not asked
    with pytest.raises(AttributeError):
        vectors_now(texts, encoder)
    assert asked == [["", "a cat", "two dogs"]]
