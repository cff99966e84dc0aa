"Sphinx settings of the site; `docs.build` runs Sphinx with them"
from importlib.metadata import version as installed
from xml.etree.ElementTree import tostring
import ziafont, ziamath
from docutils.nodes import SkipNode
from docs import base_url

ziafont.config.svg2 = False  # each glyph where it stands: several drawings share a page

project,author = 'rnnlm','The rnnlm authors'
version = release = installed('rnnlm')
language = 'en'
extensions = ['myst_nb', 'notfound.extension', 'sphinx.ext.githubpages']
if base_url: extensions.append('sphinx_sitemap')
nb_execution_mode = 'off'  # the notebooks come executed
myst_enable_extensions = ['dollarmath', 'attrs_block', 'deflist']
myst_heading_anchors = 3
html_theme = 'sphinx_book_theme'
html_theme_options = {
    'logo': {'text': 'rnnlm', 'image_light': '_static/icon.svg',
             'image_dark': '_static/icon.svg'},
    'search_bar_text': 'Search', 'toc_title': 'On this page',
    'use_download_button': False, 'use_fullscreen_button': False,
    'pygments_light_style': 'a11y-high-contrast-light',
    'pygments_dark_style': 'a11y-high-contrast-dark',
    'footer_content_items': '', 'navbar_persistent': [],
}
html_context = {'default_mode': 'auto'}
html_title = 'rnnlm'
html_favicon = '_static/icon.svg'
html_static_path = ['_static']
html_css_files = ['site.css']
html_copy_source = False
html_use_index = False
html_baseurl = base_url
sitemap_url_scheme = '{link}'
sitemap_excludes = ['search.html', '404.html']
notfound_urls_prefix = '/' + base_url.partition('github.io/')[2]
notfound_context = {'title': 'Page not found', 'body': '''<h1>Page not found</h1>

<p>There is no page at this address. The search knows every page of this site, and the
sidebar lists them.</p>'''}
html_math_renderer = 'svg'

def math(inline):
    """A visitor that writes a formula as a drawing, in the colour of the text and with
    its LaTeX source to be read out"""
    def visit(self, node):
        tex = node.astext()
        formula = ziamath.Latex(tex, size=17, color='currentColor', inline=inline)
        svg = formula.svgxml()
        style = f'vertical-align: {formula.getyofst()-1:.2f}px'
        svg.attrib |= {'role': 'img', 'aria-label': tex, 'style': style}
        svg = tostring(svg, encoding='unicode')
        self.body.append(svg if inline else f'<div class="formula">{svg}</div>')
        raise SkipNode
    return visit, None

def home_title(app, page, template, context, doctree):
    if page == 'index': context['docstitle'] = 'recurrent language models for fastai'

def setup(app):
    app.add_html_math_renderer('svg', math(inline=True), math(inline=False))
    app.connect('html-page-context', home_title)
