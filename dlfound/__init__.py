"""What everybody imports, by name: `from dlfound import Learner`; the rest is in the modules, one a lesson"""
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.0.1"

__all__ = ['Callback', 'Checkpoint', 'DataLoader', 'DataLoaders', 'Dataset', 'EarlyStopping', 'Learner', 'Metric',
           'Recorder', 'accuracy', 'lr_find', 'one_cycle', 'resume']

if TYPE_CHECKING:
    from .checkpoint import Checkpoint, resume
    from .learner import Callback, DataLoaders, Learner, Metric, Recorder
    from .loader import DataLoader
    from .minibatch import Dataset, accuracy
    from .schedule import one_cycle
    from .search import EarlyStopping, lr_find

_modules = dict(
    checkpoint='Checkpoint resume', learner='Callback DataLoaders Learner Metric Recorder', loader='DataLoader',
    minibatch='Dataset accuracy', schedule='one_cycle', search='EarlyStopping lr_find')
_home = {name: module for module, names in _modules.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    "A name is imported when it is first asked for, so that `import dlfound` takes no time"
    if name not in _home: raise AttributeError(f"module 'dlfound' has no attribute {name!r}; "
                                               f'it has {", ".join(__all__)}, and its modules have the rest')
    globals()[name] = value = getattr(import_module(f'dlfound.{_home[name]}'), name)
    return value


def __dir__() -> list[str]: return sorted({*globals(), *__all__})
