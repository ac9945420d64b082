"""Settings made before the libraries under test are imported, and the tiny model and tokenizer of all tests."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["WANDB_DISABLED"] = "true"
