"""The settings of kernels in .venv; scripts/env.sh copies this file to .venv/etc/ipython.

A picture that has not changed is the same file under another version of matplotlib, which would write its name into it.
"""
c.InlineBackend.print_figure_kwargs = dict(bbox_inches='tight', metadata={'Software': None}) # noqa: F821
