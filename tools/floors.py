"""The house rule: a module may import only from floors below its own.  The number of its notebook is its floor."""
import ast, re, sys
from pathlib import Path

def floors(root):
    "`{module: floor}` from the notebooks' numbers and their `default_exp`"
    out = {}
    for nb in sorted((root/'nbs').glob('[0-9][0-9]_*.ipynb')):
        exp = re.search(r'#\s*\|\s*default_exp\s+(\w+)', nb.read_text())
        if exp: out[exp[1]] = int(nb.name[:2])
    return out

def imports(path):
    "`(line, module)` of everything that one module imports from its own package"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            parts = (node.module or '').split('.')
            if node.level == 1 and node.module: yield node.lineno, parts[0]
            elif node.level == 1: yield from ((node.lineno, a.name) for a in node.names)
            elif parts[0] == 'miniai' and len(parts) > 1: yield node.lineno, parts[1]
            elif parts[0] == 'miniai': yield from ((node.lineno, a.name) for a in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, a.name.split('.')[1]) for a in node.names if a.name.startswith('miniai.'))

def upward(root):
    "A line for each arrow that does not point down"
    level, out = floors(root), []
    for name, floor in level.items():
        path = root/'miniai'/f'{name}.py'
        if not path.exists(): continue
        out += [f'{path.relative_to(root)}:{line}: {name} (floor {floor:02}) imports {other} (floor {level[other]:02}): imports point down'
                for line, other in imports(path) if other in level and level[other] >= floor]
    return out

if __name__ == '__main__':
    found = upward(Path(__file__).resolve().parent.parent)
    print('\n'.join(found), end='\n' if found else '')
    sys.exit(bool(found))
