"Sphinx's settings. `make site` writes the pages (collect.py) and calls Sphinx with this file."
import re
import sys
from configparser import ConfigParser
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import collect

settings = ConfigParser(delimiters=['='], interpolation=None)
settings.read(collect.root / 'settings.ini', encoding='utf-8')
s = settings['DEFAULT']
git_url = s.get('git_url', '').strip().removesuffix('/').removesuffix('.git')
on_github = git_url.startswith('https://github.com/')

project, author = s['name'], s['author']
release = re.search(r'^__version__ = "(.+)"', (collect.root / 'dlfound/__init__.py').read_text('utf-8'), re.M)[1]
html_title, html_baseurl = project, s.get('doc_url', '')
extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.viewcode', 'sphinx_copybutton', 'sphinx_markdown_builder',
              'extension']
exclude_patterns = ['.*']
smartquotes = False

# Notebooks, as they were saved
nb_execution_mode = 'off'
nb_render_markdown_format = 'myst'
nb_mime_priority_overrides = [('markdown', kind, i) for i, kind in enumerate(
    ['text/markdown', 'image/png', 'image/jpeg', 'text/plain'])]
nb_merge_streams = True
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'attrs_block']
myst_heading_anchors = 4

# Modules
autodoc_member_order = 'bysource'
autodoc_typehints = 'signature'
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = 'hide'
nitpick_ignore_regex = [('py:.*', r'(?!dlfound\b).*')] # Types of other packages
viewcode_follow_imported_members = False
viewcode_line_numbers = True

# Looks
html_theme = 'sphinx_book_theme'
html_static_path = ['static', '_work/static']
html_css_files = ['site.css']
html_favicon = 'static/icon.svg'
templates_path = ['templates']
html_copy_source = False
html_show_sourcelink = False
html_last_updated_fmt = None
html_show_copyright = False
html_show_search_summary = False # They are fetched, which a browser refuses to a page that was opened as a file
html_context = dict(default_mode='auto')
copybutton_exclude = '.linenos, .gp'
html_theme_options = dict(
    navbar_start=[], navbar_center=[], navbar_end=[], navbar_persistent=[], show_toc_level=2,
    show_navbar_depth=1, max_navbar_depth=2, collapse_navbar=True, # Else every page has all pages, twice the work
    use_download_button=bool(git_url), use_fullscreen_button=False, home_page_in_toc=False,
    toc_title='On this page', path_to_docs='', repository_branch='main')
if on_github:
    html_theme_options |= dict(
        repository_url=git_url, use_repository_button=True,
        launch_buttons=dict(colab_url='https://colab.research.google.com', binderhub_url='https://mybinder.org'))
