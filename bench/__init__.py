"""The microbenchmark suite: `make bench`, or `lolcats bench` in a checkout."""

from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
