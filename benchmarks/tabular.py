"""Compare public tables of networks with this project: what each network costs.

python benchmarks/tabular.py --table nas-bench-macro_cifar10.json --check-costs --json costs.json

The space of a table is recognised. --check-costs compares multiply-adds and parameters of every row.
"""

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

if find_spec("bsnas") is None:
    print("error: bsnas is not installed in this Python; run `make env`, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

from bsnas.benchmarks.parts.tabular.public_table import PublicTable
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.script import parse, run, write_figures
from bsnas.engine.space.canonical import canonical


@dataclass(frozen=True, kw_only=True)
class TabularArguments:
    table: Path
    """JSON file of a public table."""
    check_costs: bool = False
    """Compare multiply-adds and parameters of every row with this project's."""
    json: Path | None = None
    """File for the figures."""


def main() -> None:
    arguments = parse(TabularArguments, __doc__, sys.argv[1:])
    if not arguments.check_costs:
        raise UserError("nothing was asked for; give --check-costs")
    table = PublicTable.read(arguments.table)
    mismatches = list(table.mismatches())
    distinct = len({canonical(table.space, arch) for arch in table.archs()})
    print(f"{arguments.table.name}: {len(table.rows):,} networks of the space {table.name}, {distinct:,} different")
    for row, macs, params in mismatches[:5]:
        print(
            f"{row.code}: {row.macs} multiply-adds and {row.params} parameters in the table, {macs} and {params} here"
        )
    print(f"{len(mismatches):,} rows with other costs than here")
    figures = {
        "table": arguments.table.name,
        "space": table.name,
        "rows": len(table.rows),
        "mismatches": len(mismatches),
        "distinct": distinct,
    }
    write_figures(arguments.json, figures)
    if mismatches:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
