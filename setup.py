"Everything about the package comes from settings.ini"
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

here = Path(__file__).parent
cfg = ConfigParser(delimiters=['=']); cfg.read(here/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
pythons = [f'3.{v}' for v in range(int(cfg['min_python'].split('.')[1]), int(cfg['max_python'].split('.')[1])+1)]

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], author=cfg['author'],
    keywords=cfg['keywords'].split(), license='Apache-2.0',
    long_description=(here/'README.md').read_text(encoding='utf-8') if (here/'README.md').exists() else cfg['description'],
    long_description_content_type='text/markdown',
    packages=find_packages(include=['vt_drloc*']), include_package_data=True, zip_safe=False,
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(), extras_require=dict(dev=cfg['dev_requirements'].split()),
    classifiers=['Intended Audience :: Science/Research', 'Topic :: Scientific/Engineering :: Artificial Intelligence',
                 'Programming Language :: Python :: 3'] + [f'Programming Language :: Python :: {v}' for v in pythons],
    entry_points=dict(console_scripts=[s.strip() for s in cfg['console_scripts'].split('\n') if s.strip()],
                      nbdev=[f"{cfg['lib_name']}=vt_drloc._modidx:d"]),
)
