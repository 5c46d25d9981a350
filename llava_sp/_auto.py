"""Registers LLaVA-SP with transformers' Auto classes of configurations, models and processors.

Registering needs the Auto modules, which import torch, so `import llava_sp` does not do it: it waits until they
are loaded. The modules of transformers import each other circularly, so the time to register is not the end of an
Auto module's own import but that of the outermost import around it. A finder on `sys.meta_path` counts the depth and
removes itself when done.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys


def _register_config() -> None:
    from transformers import AutoConfig

    from llava_sp.model.configuration_llava_sp import LlavaSPConfig

    AutoConfig.register(LlavaSPConfig.model_type, LlavaSPConfig, exist_ok=True)


def _register_model() -> None:
    from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM

    from llava_sp.model.modeling_llava_sp import LlavaSPConfig, LlavaSPForCausalLM, LlavaSPModel

    AutoModel.register(LlavaSPConfig, LlavaSPModel, exist_ok=True)
    AutoModelForImageTextToText.register(LlavaSPConfig, LlavaSPForCausalLM, exist_ok=True)
    AutoModelForMultimodalLM.register(LlavaSPConfig, LlavaSPForCausalLM, exist_ok=True)


def _register_processor() -> None:
    from transformers import AutoProcessor

    from llava_sp.model.configuration_llava_sp import LlavaSPConfig
    from llava_sp.model.processing_llava_sp import LlavaSPProcessor

    AutoProcessor.register(LlavaSPConfig, LlavaSPProcessor, exist_ok=True)


class _AutoWatcher(importlib.abc.MetaPathFinder):
    """Registers each Auto class once the outermost import of transformers or llava_sp that loads it is over."""

    def __init__(self):
        self.depth = 0
        self.pending = {
            "transformers.models.auto.configuration_auto": _register_config,
            "transformers.models.auto.modeling_auto": _register_model,
            "transformers.models.auto.processing_auto": _register_processor,
        }

    def find_spec(self, fullname, path=None, target=None):
        if not fullname.startswith(("transformers.", "llava_sp.")):
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _CountingLoader(spec.loader, self)
                return spec
        return None

    def register_loaded(self) -> None:
        self.depth += 1  # imports during registration must not start it again
        try:
            while ready := [name for name in self.pending if name in sys.modules]:
                for name in ready:
                    self.pending.pop(name)()
        finally:
            self.depth -= 1
        if not self.pending and self in sys.meta_path:
            sys.meta_path.remove(self)


class _CountingLoader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, watcher: _AutoWatcher):
        self.loader, self.watcher = loader, watcher

    def __getattr__(self, name: str):
        return getattr(self.loader, name)  # `python -m` asks the loader for the module's code

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.watcher.depth += 1
        try:
            self.loader.exec_module(module)
        finally:
            self.watcher.depth -= 1
        if self.watcher.depth == 0:
            self.watcher.register_loaded()


def register_when_loaded() -> None:
    """Register now the classes that are loaded, the others when they are."""
    watcher = _AutoWatcher()
    sys.meta_path.insert(0, watcher)
    watcher.register_loaded()
