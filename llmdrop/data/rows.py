"""Rows of one data file."""

import gzip
import json
import zlib
from pathlib import Path


def read_rows(file: Path) -> list[dict]:
    """Rows of one .jsonl or .jsonl.gz file; ValueError names file and line of what is damaged."""
    opened = gzip.open if file.suffix == ".gz" else open
    rows: list[dict] = []
    number = 0
    try:
        with opened(file, "rb") as lines:
            for line in lines:
                number += 1
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"expected a JSON object, found {type(row).__name__}")
                    rows.append(row)
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        if not isinstance(error, ValueError):
            number += 1  # the compressed stream broke while reading the next line
        raise ValueError(
            f"{file}, line {number}: {error}. The file is damaged: restore or delete it "
            "(packaged data is converted again after `rm -r` of its folder)"
        ) from error
    if not rows:
        raise ValueError(f"{file} is empty; restore or delete it")
    return rows
