"""README.md from the executed nbs/index.ipynb; pictures go to images/.  nbdev's directives decide what is shown."""
import re, shutil
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r'^\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*?)\s*$')

def directives(source):
    "The cell's `#|` lines as a dictionary, and the rest of it"
    found = [DIRECTIVE.match(line) for line in source.splitlines()]
    rest = '\n'.join(line for line, m in zip(source.splitlines(), found, strict=True) if not m)
    return {m[1]: m[2].lower() for m in found if m}, rest.strip('\n')

def shown(cell):
    "The cell as a reader sees it, or None"
    if cell.cell_type != 'code': return cell
    said, cell.source = directives(cell.source)
    if 'hide' in said or said.get('include') == 'false': return None
    if said.get('output') == 'false': cell.outputs = []
    if said.get('echo') == 'false': cell.source = ''
    return cell

def readme(root=ROOT):
    nb = nbformat.read(root/'nbs/index.ipynb', as_version=4)
    nb.cells = [c for c in map(shown, nb.cells) if c is not None]
    nb.metadata.setdefault('language_info', {'name': 'python'})
    text, resources = MarkdownExporter().from_notebook_node(nb, {'unique_key': 'readme', 'output_files_dir': 'images'})
    shutil.rmtree(root/'images', ignore_errors=True)
    for name, data in resources['outputs'].items():
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_bytes(data)
    text = re.sub(r'```python\s*```\n', '', text)
    (root/'README.md').write_text(re.sub(r'\n{3,}', '\n\n', text).strip() + '\n')

if __name__ == '__main__': readme()
