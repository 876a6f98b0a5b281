"""The settings of Jupyter's server in .venv; scripts/env.sh copies this file to .venv/etc/jupyter.

A lesson that is opened, saved and closed without a change raises no question and stays the same file. By itself it
would not: a kernel that starts writes its name and language into the notebook's metadata, and JupyterLab then calls the
notebook changed. So the server hands out a notebook as its kernel would leave it, and saves it without these entries.
"""
import sys
from pathlib import Path

from jupyter_client import kernelspec
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager


class Notebooks(AsyncLargeFileManager):
    "Files as ever, but a notebook for Python comes with what its kernel will write into it, and is saved without"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.register_pre_save_hook(clean)

    async def get(self, path, *args, **kwargs):
        model = await super().get(path, *args, **kwargs)
        match model:
            case {'content': {'metadata': {'kernelspec': {'name': kernelspec.NATIVE_KERNEL_NAME}} as metadata}}:
                metadata.update(self.written_by_kernel())
        return model

    def written_by_kernel(self):
        from ipykernel.ipkernel import IPythonKernel
        name = kernelspec.NATIVE_KERNEL_NAME
        spec = self.parent.kernel_spec_manager.get_kernel_spec(name)
        return dict(kernelspec=dict(name=name, display_name=spec.display_name, language=spec.language),
                    language_info=IPythonKernel.language_info)


def clean(model, **kwargs):
    "What `make clean` does to a notebook"
    from nbdev.clean import clean_nb
    match model:
        case {'type': 'notebook', 'content': {'nbformat': 4} as nb}: clean_nb(nb)


c.ServerApp.contents_manager_class = Notebooks # noqa: F821
c.LabApp.workspaces_dir = str(Path(sys.prefix, 'share/jupyter/lab/workspaces')) # noqa: F821
