"""The packages that streaming needs and the core does not."""

import importlib
from types import ModuleType


def import_extra(name: str) -> ModuleType:
    """accelerate or psutil. Raises ImportError naming the extra of pip that brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"scoring and dropping checkpoints on disk, and scoring with several processes, needs {name}; "
            "pip install llmdrop[streaming]"
        ) from error
