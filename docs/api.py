"""The API on the site: an entry for each name, the page that lists them, and the source
they link to"""
import inspect, re
from importlib import import_module
from operator import attrgetter
from fastcore.docments import DocmentTbl, MarkdownRenderer
from nbdev.doclinks import NbdevLookup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

entries = {}  # label -> (module, name, summary), in the order in which they are shown

ENTRY = '''({label})=
### {name}

<a class="source-link" href="source/{module}.html#L-{line}" \
aria-label="Source of {name}">source</a>

```python
{signature}
```

{text}

{table}'''

def entry(name):
    """What nbdev's `show_doc(name)` shows, as Markdown: a heading to link to, the
    source, the signature, the docstring, the table of parameters"""
    lookup = NbdevLookup()
    path = lookup[name][1]  # 'rnnlm/data.py'
    line = lookup.code(name).rpartition('#L')[2]
    module = path.removesuffix('.py').replace('/', '.')
    label = name.lower()
    found = attrgetter(name)(import_module(module))
    doc = MarkdownRenderer(found, name=name, maxline=72)
    entries[label] = module,name,doc.docs.split('\n')[0]
    table = str(DocmentTbl(doc.sym))
    for o in doc.dm.dm.values(): o['docment'] = None  # they are in the table
    signature = re.sub(r'\brnnlm\.\w+\.|:NoneType(?==)', '', str(doc.dm))
    if inspect.isclass(doc.sym): signature = signature.replace('def', 'class', 1)
    return ENTRY.format(label=label, name=name, module=module, line=line, table=table,
                        signature=signature, text=doc.docs)

def link_names(text):
    """`text` with each name in backticks a link: to its entry, or its class's, or to
    the docs of fastai and fastcore; what is a link already stays"""
    kept = []
    def keep(m):
        kept.append(m[0])
        return f'\0{len(kept)-1}\0'
    def local(m):
        label = m[2]
        while label not in entries and '.' in label: label = label.rpartition('.')[0]
        return f'[{m[1]}](#{label})' if label in entries else m[1]
    text = NbdevLookup().linkify(re.sub(r'\[[^\]]*\]\([^)]*\)', keep, text))
    of_this_library = r'\[(`[^`]+`)\]\(/\w+\.html#([\w.]+)\)'  # as nbdev links them
    text = re.sub(of_this_library, local, text)
    return re.sub('\0(\\d+)\0', lambda m: kept[int(m[1])], text)

def notebook(module):
    "The notebook (its path from nbs/) that the file `module` is exported from, or None"
    text = module.read_text(encoding='utf-8')
    m = re.search(r'File to edit: \.\./nbs/(\S+\.ipynb)', text)
    return m and m[1]

SOURCE_PAGE = '''---
orphan: true
---
# Source of {name}

Exported from [its notebook](../{notebook}).

``````{{raw}} html
{html}
``````
'''

def source_pages(lib, dest):
    "A page in `dest` for each exported module in `lib`, with an anchor at each line"
    dest.mkdir()
    lexer = PythonLexer()
    formatter = HtmlFormatter(linespans='L', cssclass='highlight source')
    for module in sorted(lib.glob('*.py')):
        nb = notebook(module)
        if not nb: continue
        name = f'rnnlm.{module.stem}'
        html = highlight(module.read_text(encoding='utf-8'), lexer, formatter)
        page = SOURCE_PAGE.format(name=name, notebook=nb, html=html)
        (dest/f'{name}.md').write_text(page, encoding='utf-8')

def api_page(proc, lib, top):
    "Write the list of all entries by module; returns its description"
    description = 'Every public name of rnnlm by module, with what it does in a line.'
    text = (f'---\nmyst: {{html_meta: {{description: "{description}"}}}}\n---\n'
            + top('Names by module', description))
    modules = dict.fromkeys(m for m,*_ in entries.values())
    for module in modules:
        nb = notebook(lib.parent/f'{module.replace(".", "/")}.py')
        text += f'\n## {module}\n\nExplained in [its notebook]({nb}).\n'
        for label,(m,name,summary) in entries.items():
            if m == module: text += f'\n[`{name}`](#{label})\n: {link_names(summary)}\n'
    (proc/'api.md').write_text(text, encoding='utf-8')
    return description
