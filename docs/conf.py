"Sphinx settings of the site; `docs.build` runs Sphinx with them"
from importlib.metadata import version as installed

project,author = 'rnnlm','The rnnlm authors'
version = release = installed('rnnlm')
extensions = ['myst_nb']
nb_execution_mode = 'off'  # the notebooks come executed
myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3
html_theme = 'sphinx_book_theme'
html_title = 'rnnlm'
html_copy_source = False
