"""Puts the tables of results/ into README.md, each between `<!-- NAME -->` and `<!-- end -->`.

    python studies/readme_tables.py

NAME is that of results/NAME.md, which the command of the table wrote with results/NAME.json.
"""

import re

from run_once import ROOT


BLOCK = re.compile(r"(<!-- (?P<name>\w+) -->\n)(?P<table>.*?)(<!-- end -->)", re.DOTALL)


def main():
    path = ROOT / "README.md"

    def filled(block):
        return block[1] + (ROOT / "results" / f"{block['name']}.md").read_text() + block[4]

    path.write_text(BLOCK.sub(filled, path.read_text()))


if __name__ == "__main__":
    main()
