"""The demo model: a small chat model that ships with the package, so that everything runs without a download.

MODEL_PATH is its folder, in the layout of any Hugging Face checkpoint: `LLM(MODEL_PATH)` just loads it. The other
modules here generate its training data (`data`), train it (`train`) and score it through the engine (`score`).
"""

from pathlib import Path

MODEL_PATH = Path(__file__).parent / "model"

__all__ = ["MODEL_PATH"]
