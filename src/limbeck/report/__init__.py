"""Reports: what the directories of runs and studies say, as one HTML page, its Markdown twin and JSON. Reads files only; no torch.

`stats` sits low, below all that measures; the rest builds pages: `from limbeck.report.page import build_report`.
"""
