"""Rows of one data file."""

import gzip
import json
import zlib
from pathlib import Path


def jsonl_file(stem: Path) -> Path | None:
    """`stem`.jsonl or `stem`.jsonl.gz, whichever is there."""
    files = [stem.with_name(f"{stem.name}{suffix}") for suffix in (".jsonl", ".jsonl.gz")]
    return next((file for file in files if file.is_file()), None)


def read_rows(file: Path) -> list[dict]:
    """Rows of one .jsonl or .jsonl.gz file; ValueError names file and line of what is damaged."""
    opened = gzip.open if file.suffix == ".gz" else open
    rows: list[dict] = []
    number = 1  # of the line that is being read
    try:
        with opened(file, "rb") as lines:
            for line in lines:
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"expected a JSON object, found {type(row).__name__}")
                    rows.append(row)
                number += 1
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{file}, line {number}: {error}. The file is damaged: restore or delete it "
            "(packaged data is converted again after `rm -r` of its folder)"
        ) from error
    if not rows:
        raise ValueError(f"{file} is empty; restore or delete it")
    return rows
