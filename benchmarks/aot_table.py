"""What every size needs on common TPU slices: compiles each, keeps the reports, writes the table.

  python benchmarks/aot_table.py                 # compiles what is missing (hours on two cores)
  python benchmarks/aot_table.py --size=10b      # only these
  python benchmarks/aot_table.py --write         # only writes the table into README.md

Reports are lines of benchmarks/aot_results.jsonl, kept as each is made, so that a run that was cut
off goes on where it was. A line made by another version of the code is not made again: delete it.
"""

import argparse
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / 'benchmarks/aot_results.jsonl'
README = ROOT / 'README.md'
BEGIN, END = '<!-- aot table -->', '<!-- end of aot table -->'
SIZES = ('10b', '3b', '1b', '665m', '369m', '150m')
TOPOLOGIES = ('v5p-512', 'v6e-256', 'v5e-256', 'v5p-128', 'v4-128')
# Flags by (size, topology) where the default is not the layout to try, or not the only one: the
# best that fits is in the table. Shards of 16 rows are whole tiles, so that nothing is copied.
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
  """(size, topology, flags) of every compilation."""
  for size in SIZES:
    for topology in TOPOLOGIES:
      for flags in LAYOUTS.get((size, topology), [()]):
        yield size, topology, flags
  yield TWO_SLICES


def compile_cell(size: str, topology: str, flags: tuple[str, ...]) -> dict:
  command = [sys.executable, '-m', 'fluid_jax.aot', f'--config=configs/fluid_{size}.py']
  command += [f'--topology={topology}', '--json', *flags]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  lines = done.stdout.splitlines()
  if not lines or not lines[-1].startswith('{'):
    raise SystemExit(f'{" ".join(command)} failed:\n{done.stderr[-2000:]}')
  return {'size': size, 'flags': list(flags), **json.loads(lines[-1])}


def read_results() -> list[dict]:
  return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table(results: list[dict]) -> str:
  """The best layout of each size and slice that was compiled."""
  best = {}
  for r in results:
    key = r['size'], r['topology'], r['slices']
    rank = not r['fits'], r.get('estimated_step_seconds', 0.0)
    if key not in best or rank < best[key][0]:
      best[key] = rank, r
  lines = [
    '| config | slice | chips | replica x fsdp x tensor | remat | a chip holds | step | MFU |',
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
  made = sorted({(r['date'], r['versions']['jax'], r['versions']['libtpu']) for r in results})
  lines += ['', *(f'Made {day} with jax {jax}, libtpu {libtpu}.' for day, jax, libtpu in made)]
  return '\n'.join(lines)


def write_readme(results: list[dict]) -> None:
  text = README.read_text()
  before, rest = text.split(BEGIN)
  _, after = rest.split(END)
  README.write_text(f'{before}{BEGIN}\n{table(results)}\n{END}{after}')


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--size', action='append', choices=SIZES, help='only these sizes')
  parser.add_argument('--topology', action='append', help='only these slices')
  parser.add_argument('--write', action='store_true', help='compile nothing')
  args = parser.parse_args()
  results = read_results()
  made = {(r['size'], r['topology'], tuple(r['flags'])) for r in results}
  todo = [
    cell
    for cell in cells()
    if cell not in made
    and (not args.size or cell[0] in args.size)
    and (not args.topology or cell[1] in args.topology)
  ]
  for number, cell in enumerate([] if args.write else todo, 1):
    print(f'{number}/{len(todo)}: fluid_{cell[0]} on {cell[1]} {" ".join(cell[2])}', flush=True)
    report = compile_cell(*cell)
    with RESULTS.open('a') as file:
      file.write(json.dumps(report) + '\n')
  write_readme(read_results())


if __name__ == '__main__':
  main()
