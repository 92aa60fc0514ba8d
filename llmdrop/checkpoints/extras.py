"""Packages that only some of the library needs: the extras of pip."""

import importlib
from types import ModuleType


def import_extra(name: str, extra: str) -> ModuleType:
    """Import a module of another package. Raises ImportError saying which extra of llmdrop brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"this needs {name} ({error}): pip install 'llmdrop[{extra}]'") from error
