"""Compiles all sizes for common TPU slices and writes the table in docs/tpu.md.

  python benchmarks/aot_table.py                 # compile missing layouts (hours on two cores)
  python benchmarks/aot_table.py --size=10b      # only this size
  python benchmarks/aot_table.py --write         # only write the table

Each report is appended to benchmarks/aot_results.jsonl when it is ready, so an interrupted run
resumes. Reports of older code are not updated: to make one again, delete its line.
"""

import argparse
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / 'benchmarks/aot_results.jsonl'
PAGE = ROOT / 'docs/tpu.md'
BEGIN, END = '<!-- aot table -->', '<!-- end of aot table -->'
SIZES = ('10b', '3b', '1b', '665m', '369m', '150m')
TOPOLOGIES = ('v5p-512', 'v6e-256', 'v5e-256', 'v5p-128', 'v4-128')
# Flags by (size, topology) where the default layout does not fit or is not the best one. If there
# are several, the table shows the best. Shards of 16 rows fill complete tiles and need no copies.
SQUARE = ('--mesh=replica=16,fsdp=16',)
SIDE = ('--mesh=replica=32,fsdp=8',)
IN_2, IN_4 = (f'--config.optimizer.accumulation_steps={count}' for count in (2, 4))
SMALLER = SIZES[1:]
LAYOUTS = {
  **{(size, topology): [SQUARE] for size in SMALLER for topology in ('v5e-256', 'v6e-256')},
  **{(size, 'v5p-512'): [SIDE] for size in SMALLER},
  ('10b', 'v5e-256'): [('--remat=full',)],
  ('10b', 'v4-128'): [('--mesh=fsdp=64', IN_4), ('--mesh=replica=2,fsdp=32', IN_4)],
  ('3b', 'v4-128'): [('--mesh=replica=4,fsdp=16', IN_2)],
}
TWO_SLICES = ('10b', 'v5p-256', ('--slices=2', '--preset=multislice'))


def cells():
  """Yields (size, topology, flags) of all compilations."""
  for size in SIZES:
    for topology in TOPOLOGIES:
      for flags in LAYOUTS.get((size, topology), [()]):
        yield size, topology, flags
  yield TWO_SLICES


def compile_cell(size: str, topology: str, flags: tuple[str, ...]) -> dict:
  """The report of one compilation."""
  command = [sys.executable, '-m', 'fluid_jax.aot', f'--config=fluid_{size}']
  command += [f'--topology={topology}', '--json', *flags]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  lines = done.stdout.splitlines()
  if not lines or not lines[-1].startswith('{'):
    raise SystemExit(f'{" ".join(command)} failed:\n{done.stderr[-2000:]}')
  return {'size': size, 'flags': list(flags), **json.loads(lines[-1])}


def read_results() -> list[dict]:
  return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table(results: list[dict]) -> str:
  """Markdown table with the best compiled layout of each size and slice."""
  best = {}
  for r in results:
    key = r['size'], r['topology'], r['slices']
    rank = not r['fits'], r.get('estimated_step_seconds', 0.0)
    if key not in best or rank < best[key][0]:
      best[key] = rank, r
  lines = [
    '| config | slice | chips | replica x fsdp x tensor | remat | memory per chip | step | MFU |',
    '|---|---|---|---|---|---|---|---|',
  ]
  order = [(s, t, 1) for s in SIZES for t in TOPOLOGIES] + [(*TWO_SLICES[:2], 2)]
  for key in order:
    if key not in best:
      continue
    r = best[key][1]
    where = f'2 x {r["topology"]}' if r['slices'] == 2 else r['topology']
    mesh = ' x '.join(str(size) for size in r['mesh'].values())
    parts = [flag.rpartition('=')[2] for flag in r['flags'] if 'accumulation_steps' in flag]
    remat = ', '.join([r['remat'], *(f'{count} microbatches' for count in parts)])
    row = [f'`fluid_{r["size"]}`', where, str(r['chips']), mesh, remat]
    if r['fits']:
      held = f'{r["peak_bytes_per_device"] / 1e9:.1f} of {r["hbm_bytes"] / 1e9:.0f} GB'
      row += [held, f'{r["estimated_step_seconds"]:.3f} s', f'{r["estimated_mfu"]:.0%}']
    else:
      row += ['does not fit', '', '']
    lines.append(f'| {" | ".join(row)} |')
  versions = sorted({(r['date'], r['versions']['jax'], r['versions']['libtpu']) for r in results})
  lines.append('')
  lines += [f'- Compiled on {day} with jax {jax}, libtpu {tpu}.' for day, jax, tpu in versions]
  return '\n'.join(lines)


def write_page(results: list[dict]) -> None:
  """Replaces the table between the markers in docs/tpu.md."""
  text = PAGE.read_text()
  before, rest = text.split(BEGIN)
  _, after = rest.split(END)
  PAGE.write_text(f'{before}{BEGIN}\n{table(results)}\n{END}{after}')


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--size', action='append', choices=SIZES, help='only these sizes')
  parser.add_argument('--topology', action='append', help='only these slices')
  parser.add_argument('--write', action='store_true', help='write the table only')
  args = parser.parse_args()
  results = read_results()
  done = {(r['size'], r['topology'], tuple(r['flags'])) for r in results}
  todo = [
    cell
    for cell in cells()
    if cell not in done
    and (not args.size or cell[0] in args.size)
    and (not args.topology or cell[1] in args.topology)
  ]
  for number, cell in enumerate([] if args.write else todo, 1):
    print(f'{number}/{len(todo)}: fluid_{cell[0]} on {cell[1]} {" ".join(cell[2])}', flush=True)
    report = compile_cell(*cell)
    with RESULTS.open('a') as file:
      file.write(json.dumps(report) + '\n')
  write_page(read_results())


if __name__ == '__main__':
  main()
