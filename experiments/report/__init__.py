"""What a run says at its end: tables, pictures, and one page with all of it.

tables.py    methods, contrasts, health and costs as text, which every run writes
read.py      a finished run, read back from its folder
figures.py   the page's pictures
page.py      `python -m experiments.report --workdir=DIR`: one HTML file without a network
"""

from experiments.report.page import write_page
from experiments.report.tables import write_report, write_sets, write_table

__all__ = ["write_page", "write_report", "write_sets", "write_table"]
