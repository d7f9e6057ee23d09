from __future__ import annotations

import os

# Before any import of huggingface_hub: a wrong path must fail here, not ask the network.
os.environ["HF_HUB_OFFLINE"] = "1"
