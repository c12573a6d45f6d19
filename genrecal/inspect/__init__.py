"""What a cache holds: a summary, one record, or the result of an SQL query, each as plain values.

`genrecal inspect` prints them (`genrecal.inspect.text`); `genrecal.report` makes pages of them.
"""

from genrecal.inspect.record import RecordDescription, describe_record, find_record, save_images
from genrecal.inspect.sql import SqlResult, run_sql
from genrecal.inspect.summary import Summary, summarize
from genrecal.inspect.unlikely import least_likely

__all__ = [
    "RecordDescription",
    "SqlResult",
    "Summary",
    "describe_record",
    "find_record",
    "least_likely",
    "run_sql",
    "save_images",
    "summarize",
]
