"""For tests, and shipped: a clock that a test turns, and both sides over a network in memory."""
