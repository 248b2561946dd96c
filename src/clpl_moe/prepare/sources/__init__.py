"""The data sets that ``prepare`` reads, a module each; every module in this folder is found."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
