"""For tests, and shipped: a clock that a test advances, and both sides over a network in memory."""
