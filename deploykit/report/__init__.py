"""What was made, for people: a table in the terminal, a page for colleagues, and how to run it beside the files."""

from deploykit.report.page import write_report
from deploykit.report.table import result_table, summary_json
from deploykit.report.usage import write_usage
from deploykit.report.verify import verify_artifact

__all__ = ["result_table", "summary_json", "verify_artifact", "write_report", "write_usage"]
