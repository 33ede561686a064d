"""One self-contained HTML page about one or several finished or running runs. Does not import torch.

`runs` reads run folders, `groups` combines the seeds of a setting, `series` and `intervals` compute statistics,
`charts` sorts the metrics of `tracking/table.py` into charts and tables, `plots` draws them, `settings` compares
configurations, `summary` fills the table at the top, `comparison` that of differences to a baseline, and `page` renders
the template. `results` reads evaluations, and `tables` writes them as a table for a paper.
"""

from megatron_g2rl.report.page import write_report

__all__ = ["write_report"]
