import os
import sys
from pathlib import Path

# the suite is about the CPU, also of machines with a GPU, and in its subprocesses; `make gpu` has the checks of those
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a scheduler may have set it
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def smollm2():
    """The real embedded model and its tokenizer."""
    import llmdrop

    return llmdrop.load_model("smollm2-135m", device="cpu")
