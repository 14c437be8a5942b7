"""The microbenchmark suite: `make bench`, or `lolcats bench` in a checkout."""
