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

# these take minutes, so they come first: at the end one worker would run one of them and the others would wait
LONG = ["test_gpu.py", "test_paper_profile.py", "test_evaluate.py", "test_device.py", "test_training.py",
        "test_coverage.py", "test_make.py", "test_streaming.py"]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def smollm2():
    """The real embedded model and its tokenizer."""
    import llmdrop

    return llmdrop.load_model("smollm2-135m", device="cpu")
