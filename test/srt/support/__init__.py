"""What the test lanes share."""
