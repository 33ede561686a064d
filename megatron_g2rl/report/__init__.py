"""One self-contained HTML page about one or several finished or running runs. Knows no torch.

`runs` reads their folders, `series` makes numbers of the metrics, `charts` says what is drawn and `plots` draws it,
`settings` compares configurations, `summary` writes the text at the top, `page` puts all into the template.
"""

from megatron_g2rl.report.page import write_report

__all__ = ["write_report"]
