"""For tests, and shipped with the product: a clock, a data plane in memory, and a whole world made of them."""
