"Reads every field of the package from settings.ini, its one source."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

root = Path(__file__).parent
config = ConfigParser(delimiters=['='], interpolation=None)
config.read(root/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

setup(
    version=cfg['version'],
    description=cfg['description'],
    long_description=(root/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    keywords=cfg['keywords'].split(),
    author=cfg['author'],
    license_expression=cfg['license'],
    python_requires='>=' + cfg['min_python'],
    packages=[cfg['lib_name']],
    package_data={cfg['lib_name']: ['py.typed']},
    install_requires=cfg['requirements'].split(),
    extras_require={'dev': cfg['dev_requirements'].split()},
    entry_points={'console_scripts': cfg['console_scripts'].splitlines(),
                  'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
)
