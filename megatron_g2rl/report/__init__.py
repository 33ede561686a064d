"""One self-contained HTML page about one or several finished or running runs. Does not import torch.

`runs` reads run folders, `series` computes statistics, `charts` sorts the metrics of `tracking/table.py` into charts
and tables, `plots` draws them, `settings` compares configurations, `summary` fills the table at the top, and `page`
renders the template.
"""

from megatron_g2rl.report.page import write_report

__all__ = ["write_report"]
