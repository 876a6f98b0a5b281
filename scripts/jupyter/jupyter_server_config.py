"""The settings of Jupyter's server in .venv; scripts/env.sh copies this file to .venv/etc/jupyter.

Whoever opens, saves and closes a lesson without a change should find neither a question nor a changed file. But a kernel
that starts writes its names and language into the notebook's metadata, and JupyterLab then calls the notebook changed.
So the server hands a notebook out as its kernel would leave it, and takes these entries off again before it saves.
"""
import sys
from pathlib import Path

from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, NoSuchKernel
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager


class Notebooks(AsyncLargeFileManager):
    "Files as ever; a notebook for Python comes with the metadata that its running kernel would add"

    async def get(self, path, *args, **kwargs):
        model = await super().get(path, *args, **kwargs)
        if model['type'] == 'notebook' and model['content']: self.complete(model['content'].get('metadata', {}))
        return model

    def complete(self, metadata):
        from ipykernel.ipkernel import IPythonKernel
        if metadata.get('kernelspec', {}).get('name') != NATIVE_KERNEL_NAME: return
        try: spec = self.parent.kernel_spec_manager.get_kernel_spec(NATIVE_KERNEL_NAME)
        except NoSuchKernel: return
        metadata['kernelspec'] = dict(name=NATIVE_KERNEL_NAME, display_name=spec.display_name, language=spec.language)
        metadata['language_info'] = IPythonKernel.language_info


def clean(model, **kwargs):
    "What `make clean` does to a notebook"
    from nbdev.clean import clean_nb
    if model['type'] == 'notebook' and model['content'].get('nbformat') == 4: clean_nb(model['content'])


c.ServerApp.contents_manager_class = Notebooks # noqa: F821
c.ContentsManager.pre_save_hook = clean # noqa: F821
c.LabApp.workspaces_dir = str(Path(sys.prefix, 'share/jupyter/lab/workspaces')) # noqa: F821
