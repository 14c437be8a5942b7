"""What the tests of operators share."""
