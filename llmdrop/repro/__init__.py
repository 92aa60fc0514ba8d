"""The paper: its numbers and claims, the results store, quality and timing of variants, statistics, tables and figures."""
