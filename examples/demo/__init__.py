"""`make demo`: linearize a real language model end to end and measure what came out."""
