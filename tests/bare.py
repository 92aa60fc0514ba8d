"""As if only some packages were installed: for what must run without the others. Used in processes of their own."""

import importlib.metadata
import re
import sys
from functools import cache

from packaging.requirements import Requirement

CORE_REQUIREMENTS = {"torch", "transformers", "safetensors", "numpy", "pandas", "tqdm", "filelock"}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def distributions() -> dict[str, set[str]]:
    """{name in an import: distributions that bring it}, of what is installed."""
    by_import = importlib.metadata.packages_distributions()
    return {name: set(map(normalized, names)) for name, names in by_import.items()}


def requirements_of(names: set[str]) -> set[str]:
    """These distributions and all that they require on this machine, extras left out."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = normalized(left.pop())
        if name in found:
            continue
        found.add(name)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # for another platform
            continue
        for line in lines:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                left.append(requirement.name)
    return found


class OnlySome:
    """Every finder of modules, blind for the hidden packages."""

    def __init__(self, finders: list, modules: set[str], names: set[str]):
        self.finders = finders
        self.modules = modules
        self.names = names  # of distributions

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.modules:
            return None
        for finder in self.finders:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                return spec
        return None

    def find_distributions(self, *args, **kwargs):
        for finder in self.finders:
            if hasattr(finder, "find_distributions"):
                for distribution in finder.find_distributions(*args, **kwargs):
                    if normalized(distribution.metadata["Name"] or "") not in self.names:
                        yield distribution


def hide_all_but(modules: set[str]) -> set[str]:
    """Hide from this process all packages but these (names of imports) and what they require; returns the hidden."""
    by_import = distributions()
    needed = requirements_of(set().union(*(by_import.get(module, {module}) for module in modules)))
    kept = {module for module, names in by_import.items() if names & needed}
    hidden = set(by_import) - kept - {"llmdrop"} - set(sys.stdlib_module_names)
    installed = {normalized(distribution.metadata["Name"]) for distribution in importlib.metadata.distributions()}
    sys.meta_path[:] = [OnlySome(list(sys.meta_path), hidden, installed - needed - {"llmdrop"})]
    return hidden
