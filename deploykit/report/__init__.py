"""What was made, for people: a table in the terminal, a page for colleagues, and how to run it beside the files."""

from deploykit.report.table import result_table, summary_json
from deploykit.report.usage import write_usage
from deploykit.report.write import report_json, write_report

__all__ = ["report_json", "result_table", "summary_json", "write_report", "write_usage"]
