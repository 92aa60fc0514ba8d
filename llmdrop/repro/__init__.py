"""The paper: its numbers and claims, the store, quality and timing of variants, statistics, tables and figures."""
